"""Prompts and seeds are shared between attentions; rows carry intervals and provenance."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from genattn.apps.sampling.compare import compare, parse_attention
from genattn.apps.sampling.run import SamplingSettings, open_pipeline
from genattn.apps.tuning.journal import Journal
from genattn.errors import GenAttnError
from genattn.profiling.profile import profile


@pytest.mark.filterwarnings("ignore:genattn. .* acts at no step")
def test_rows(random_wan_folder: Path) -> None:
    settings = SamplingSettings(model=str(random_wan_folder), frames=17, height=128, width=128, steps=2, guidance_scale=1.0)
    seen: list[tuple[int, int]] = []
    wanted = [parse_attention("radial@0", dense_layers=0), parse_attention("radial@2")]
    rows = compare(["a cat", "a dog"], wanted, settings, seed=7, on_sample=lambda *at: seen.append(at))
    assert [row["attention"] for row in rows] == ["dense", "radial@0", "radial@2"]
    dense, sparse, kept_dense = rows
    assert seen == [(3, 6), (6, 6)]
    assert dense["density"] == 1
    assert "psnr" not in dense
    assert sparse["density"] < 1
    assert sparse["psnr_low"] <= sparse["psnr"] <= sparse["psnr_high"] < float("inf")
    assert kept_dense["psnr"] == float("inf")  # both steps dense: the stock result to the bit
    assert kept_dense["ssim"] == 1
    assert all(row["n"] == 2 and row["commit"] and row["date"] for row in rows)


def test_a_stop_loses_the_prompt_at_hand_alone(
    random_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genattn.apps.sampling import compare as room

    settings = SamplingSettings(model=str(random_wan_folder), frames=5, height=32, width=32, steps=1, guidance_scale=1.0)
    wanted = [parse_attention("radial@0", dense_layers=0)]
    prompts, ran, real = ["a cat", "a dog", "a cow"], [], room.run_once

    def counted(pipe: Any, call: Any, prompt: str, seed: int, attention: Any, title: str) -> Any:
        ran.append((prompt, seed, attention.name, title))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return real(pipe, call, prompt, seed, attention, title)

    monkeypatch.setattr(room, "run_once", counted)
    path = tmp_path / "j.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(prompts, wanted, settings, 5, kept=Journal(path, {}))
    first = Journal(path, {}).samples
    assert [(line["prompt"], line["setting"]) for line in first] == [(0, "dense"), (0, "radial@0")]
    ran.clear()
    ran.extend([()] * 4)
    seen: list[tuple[int, int]] = []
    rows = compare(prompts, wanted, settings, 5, lambda *at: seen.append(at), Journal(path, {}))
    assert ran[4:] == [
        ("a dog", 6, "dense", "2/3 dense"),
        ("a dog", 6, "radial@0", "2/3 radial@0"),
        ("a cow", 7, "dense", "3/3 dense"),
        ("a cow", 7, "radial@0", "3/3 radial@0"),
    ]
    assert seen == [(4, 6), (6, 6)]
    lines = Journal(path, {}).samples
    dense = [line["seconds"] for line in lines if line["setting"] == "dense"]
    assert dense[0] == first[0]["seconds"]
    assert rows[0]["n"] == rows[1]["n"] == 3
    assert rows[0]["seconds"] == round(sum(dense) / 3, 4)
    ran.clear()
    again = compare(prompts, wanted, settings, 5, kept=Journal(path, {}))
    assert ran == [], "everything is there"
    same = [name for name in rows[1] if name != "date"]
    assert [{name: row[name] for name in same if name in row} for row in again] == [
        {name: row[name] for name in same if name in row} for row in rows
    ]


def test_a_journal_knows_weights_and_maps_from_their_names(random_wan_folder: Path, tmp_path: Path) -> None:
    model, given = tmp_path / "model", tmp_path / "map.safetensors"
    shutil.copytree(random_wan_folder, model)
    settings = SamplingSettings(model=str(model), frames=17, height=128, width=128, steps=1, guidance_scale=1.0)
    pipe = open_pipeline(settings)
    call = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 1, "output_type": "latent"}
    for name, density in (("map", 0.3), ("other", 0.6)):
        profile(pipe, lambda text: pipe(text, **call), ["a", "b"], density, tmp_path / f"{name}.safetensors")
    wanted, path = [parse_attention(f"{given}@0", dense_layers=0)], tmp_path / "j.jsonl"
    first = compare(["a cat"], wanted, settings, 5, kept=Journal(path, {}))
    count = len(path.read_text().splitlines())
    assert compare(["a cat"], wanted, settings, 5, kept=Journal(path, {}))[1]["seconds"] == first[1]["seconds"]
    assert len(path.read_text().splitlines()) == count
    # another map under the name runs anew
    (tmp_path / "other.safetensors").replace(given)
    wanted = [parse_attention(f"{given}@0", dense_layers=0)]
    rows = compare(["a cat"], wanted, settings, 5, kept=Journal(path, {}))
    assert rows[1]["attention"] == first[1]["attention"] == f"{given}@0"
    assert rows[1]["density"] > first[1]["density"]
    # other weights under the name are refused
    file = next((model / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(GenAttnError, match="belongs to a request with other weights; name another --out"):
        compare(["a cat"], wanted, settings, 5, kept=Journal(path, {}))


def test_what_is_left_out_is_the_presets() -> None:
    assert parse_attention("auto").schedule == {}
    assert parse_attention("auto@0", dense_layers=2).schedule == {"dense_steps": 0, "dense_layers": 2}
    assert parse_attention("radial").schedule == {"dense_steps": 0.25, "dense_layers": 1}


def test_refusals(random_wan_folder: Path) -> None:
    with pytest.raises(GenAttnError, match="at least one prompt"):
        compare([], [], SamplingSettings(model=str(random_wan_folder)))
    with pytest.raises(GenAttnError, match="always samples dense"):
        parse_attention("dense")
    with pytest.raises(GenAttnError, match="NAME or NAME@DENSE_STEPS, got 'radial@x'"):
        parse_attention("radial@x")
