"""The LoRA for motions that go on: what its clips and steps show, its training, and the table of what it is worth."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.cache import ClipSize
from genattn.pipelines.tiny.evaluate import append_rows
from genattn.pipelines.tiny.studies import endless, endless_scores as scores
from genattn.pipelines.tiny.world import ENDLESS, MOTIONS, caption, is_held_out, parse_caption, render, settle
from genattn.pipelines.training.trainer import TrainSettings

MODEL = Path(__file__).resolve().parents[4] / "assets" / "tiny-wan-long"


@pytest.fixture
def pipe() -> Any:
    return WanPipeline.from_pretrained(MODEL)


def test_a_third_of_the_clips_show_known_motions_and_none_is_held_out() -> None:
    scenes = [endless.training_scene(number) for number in range(180)]
    known = [{thing.motion for thing in scene.objects} <= set(MOTIONS) for scene in scenes]
    assert [index for index, flag in enumerate(known) if flag] == list(range(2, 180, 3))
    assert not any(is_held_out(*thing.combination) for scene in scenes for thing in scene.objects)
    placed = [settle(scene).objects[0].offset == scene.objects[0].offset for scene in scenes]
    for kind in (0, 1):  # of endless ones and of known ones alike two in three stand where they usually do
        flags = [flag for flag, old in zip(placed, known, strict=True) if old == bool(kind)]
        assert sum(flags) / len(flags) == pytest.approx(2 / 3)


def test_five_steps_show_pieces_of_every_kind_with_their_own_captions() -> None:
    latents = torch.arange(6)[:, None, None, None, None] * 100.0 + torch.arange(8)[None, None, :, None, None]
    latents = latents.expand(6, 2, 8, 3, 3)
    ids = torch.arange(6)[:, None]
    shown = []
    for step in range(5):
        pieces, asked = endless.draw_pieces(latents, ids, step, False, torch.Generator().manual_seed(step))
        shown.append((len(pieces), pieces.shape[2]))
        assert (pieces[:, 0, 0, 0, 0] // 100).tolist() == asked[:, 0].tolist()
        assert (pieces.diff(dim=2) == 1).all()
    assert shown == [(1, 8), (12, 1), (3, 4), (12, 1), (3, 4)]
    assert endless.draw_pieces(latents, ids, 1, True, torch.Generator())[0].shape == (1, 2, 8, 3, 3)


def test_two_objects_with_endless_motions_fit_into_the_tokens() -> None:
    pipe = WanPipeline.from_pretrained(MODEL, transformer=None, vae=None, text_encoder=None)
    text = "a small red triangle moves left and right and a small blue square moves up and down on a dark background"
    ids = endless.token_ids(pipe, [text, ""])
    assert ids.shape == (2, endless.ENDLESS_TEXT_TOKENS)
    assert (ids == 0).any(1).all()  # the loss needs a pad in each row


def test_clips_are_encoded_once_with_their_captions_and_places(pipe: Any, tmp_path: Path) -> None:
    size = ClipSize(5, 16, 16)
    latents, ids = endless.encoded_clips(pipe, tmp_path, 3, size, 16)
    assert latents.shape == (3, 17, 2, 4, 4)
    assert latents[:, -11:].abs().amax() > 1
    assert torch.equal(ids, endless.token_ids(pipe, [caption(endless.training_scene(number)) for number in range(3)]))
    made = sorted(tmp_path.rglob("*.safetensors"))
    assert torch.equal(endless.encoded_clips(pipe, tmp_path, 3, size, 16)[0], latents)
    assert sorted(tmp_path.rglob("*.safetensors")) == made


def test_training_leaves_a_stock_lora_and_goes_on_where_it_stopped(pipe: Any, tmp_path: Path) -> None:
    before = pipe.transformer.blocks[0].attn1.to_q.weight.clone()
    latents, ids = torch.randn(3, 17, 4, 4, 4), endless.token_ids(pipe, ["a red circle grows on a dark background"] * 3)
    assert endless.train_lora(pipe, latents, ids, tmp_path, 2, TrainSettings(2, learning_rate=1e-2, warmup=0)) == 2
    assert torch.equal(pipe.transformer.blocks[0].attn1.to_q.base_layer.weight, before)
    fresh = WanPipeline.from_pretrained(MODEL)
    assert endless.train_lora(fresh, latents, ids, tmp_path, 2, TrainSettings(3, learning_rate=1e-2, warmup=0)) == 3
    loaded = WanPipeline.from_pretrained(MODEL)
    loaded.load_lora_weights(tmp_path / "lora")
    layer = loaded.transformer.blocks[0].attn1.to_q
    assert any(weight.weight.abs().max() > 0 for weight in layer.lora_B.values())


def test_the_shipped_lora_changes_every_layer_and_leaves(pipe: Any) -> None:
    folder = MODEL.parent / "loras" / "tiny-wan-long-endless"
    before = {name: weight.clone() for name, weight in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(folder)
    for block in pipe.transformer.blocks:
        for attention in (block.attn1, block.attn2):
            for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
                assert all(weight.weight.abs().max() > 0 for weight in layer.lora_B.values())
    pipe.unload_lora_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.named_parameters())


def test_held_out_captions_are_different_and_held_out() -> None:
    for kind, motions in (("endless", ENDLESS), ("known", MOTIONS)):
        found = scores.held_out_scenes(kind, 20)
        assert len({caption(scene) for scene in found}) == 20
        assert all(is_held_out(*scene.objects[0].combination) for scene in found)
        assert {scene.objects[0].motion for scene in found} <= set(motions)
    assert len(scores.held_out_scenes("endless", 99)) == 99  # all that there are


def test_clips_are_made_once_and_those_of_the_lora_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []

    def generate(pipe: Any, scenes: Any, *_: Any) -> Any:
        made.append((caption(scenes[0]), bool(pipe.get_active_adapters())))
        return [render(parse_caption(caption(scene)), 9) for scene in scenes]

    monkeypatch.setattr(scores, "generate_clips", generate)
    pipe = WanPipeline.from_pretrained(MODEL)
    endless.train_lora(
        pipe, torch.randn(1, 17, 4, 4, 4), torch.ones(1, 24).long() * (torch.arange(24) < 3), tmp_path, 2, TrainSettings(1)
    )
    lora, table = tmp_path / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "rows.csv"
    command = ["--model", str(MODEL), "--lora", str(lora), "--count", "2", "--kinds", "endless", "--table", str(table)]
    scores.main(command)
    scores.main(command)
    assert [with_lora for _, with_lora in made] == [False, False, True, True]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["as it is"] * 2 + ["with the LoRA"] * 2
    assert all(row["motion"] == "1" and row["read"] == row["asked"] for row in rows)


def test_the_table_pairs_by_caption(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    facts = {"shape": 1, "colour": 1, "consistency": 0.5, "steps": 8, "device": "CPU", "torch": "2", "date": "today"}
    for arm, motions in (("as it is", {"a": 0, "b": 0, "c": 1, "d": 1}), ("with the LoRA", {"a": 1, "b": 1, "c": 0})):
        append_rows(table, [{"arm": arm, "kind": "endless", "caption": c, "motion": m, **facts} for c, m in motions.items()])
    lines = [line.strip("| ").split(" | ") for line in scores.scores_markdown(table).split("\n")[2:-2]]
    assert [line[1:3] for line in lines] == [["as it is", "3"], ["with the LoRA", "3"]]
    assert [line[3][:4] for line in lines] == ["0.33", "0.67"]
    assert [line[7] for line in lines] == ["-", "2, 1"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="count must lie in 1 to 99, got 100"):
        scores.main(["--count", "100"])
    with pytest.raises(GenAttnError, match="lora must be a safetensors file, got None"):
        scores.main(["--model", str(MODEL), "--arms", "with the LoRA"])
    with pytest.raises(GenAttnError, match="must be a tiny pipeline's folder"):
        scores.main(["--model", str(tmp_path)])
    with pytest.raises(GenAttnError, match="clips must be >= 1, got 0"):
        endless.main(["--run-dir", str(tmp_path), "--clips", "0"])
