import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import card, card as tiny_card, wan as tiny_wan
from genattn.pipelines.tiny.curriculum import Curriculum, latent_statistics
from genattn.pipelines.tiny.denoiser import DenoiserSize
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults, assemble, export
from genattn.pipelines.tiny.latents import load_latents
from genattn.pipelines.tiny.resume import adopt
from genattn.pipelines.tiny.vae import build_vae, training_clips
from genattn.pipelines.training.places import POSITION_CHANNELS
from genattn.pipelines.training.trainer import TrainSettings, step_generator

SHIPPED = Path(__file__).resolve().parents[3] / "assets" / "tiny-wan"
SMALL = DenoiserSize(2, 12, 1, 24)
FEW = Curriculum(2, 4, still_batch=2, frame_batch=2, clip_batch=1)


@pytest.fixture(scope="module")
def shipped():
    pipeline = WanPipeline.from_pretrained(SHIPPED, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_shipped_pipeline_is_whole_and_stock(shipped):
    kinds = {
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
        "tokenizer": PreTrainedTokenizerBase,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    assert type(shipped) is WanPipeline
    for name, kind in kinds.items():
        assert isinstance(getattr(shipped, name), kind), name
    config = shipped.transformer.config
    assert config.num_layers >= 4
    assert config.num_attention_heads >= 4
    assert tuple(config.patch_size) == (1, 2, 2)
    assert config.qk_norm == "rms_norm_across_heads"
    assert config.cross_attn_norm
    assert all(value > 0 for value in shipped.vae.config.latents_std)


def test_the_shipped_folder_is_small_and_holds_no_pickle():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md"}
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".md"}


def test_the_shipped_defaults_are_what_the_pipeline_takes(shipped):
    defaults = GenerationDefaults(**json.loads((SHIPPED / DEFAULTS_FILE).read_text()))
    assert (defaults.height, defaults.width, defaults.frames, defaults.fps) == (64, 64, 29, 16)
    latents = shipped(
        "a red circle moves right on a dark background",
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    assert latents.shape == (1, shipped.transformer.config.in_channels, 8, 16, 16)


def test_the_shipped_pipeline_makes_a_clip(shipped):
    prompts = ["a red circle moves right on a dark background", ""]
    clips = shipped(
        prompts,
        height=64,
        width=64,
        num_frames=29,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
    ).frames
    assert clips.shape == (2, 29, 64, 64, 3)
    assert np.isfinite(clips).all()
    assert clips.min() >= 0
    assert clips.max() <= 1
    assert clips[0].std() > 0.01


def test_the_card_says_what_was_measured():
    card = (SHIPPED / "README.md").read_text()
    for word in ("Apache-2.0", "Seed", "minutes", "steps", "colour", "shape", "motion", "unseen", "CPU", "Limits"):
        assert word in card, word


@pytest.fixture
def run_dir(tmp_path):
    """A run with a fresh autoencoder and a shard of each kind of latents."""
    torch.manual_seed(0)
    build_vae(z_dim=4, base_dim=4, decoder_base_dim=4).save_pretrained(tmp_path / "vae")
    accelerator = Accelerator(cpu=True)
    assert tiny_wan.make_latents(tmp_path, accelerator, range(1), range(1), minutes=10) == (1, 1)
    return tmp_path


def test_how_many_settled_shards_can_be_said(tmp_path):
    torch.manual_seed(0)
    build_vae(z_dim=4, base_dim=4, decoder_base_dim=4).save_pretrained(tmp_path / "vae")
    tiny_wan.make_latents(tmp_path, Accelerator(cpu=True), range(0), range(1), minutes=10, settled=(0, 2))
    assert len(list((tmp_path / "stills").iterdir())) == 1
    assert len(list((tmp_path / "settled-stills").iterdir())) == 2
    assert not list((tmp_path / "settled-clips").iterdir())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_pairs_reaches_every_kind_of_scene(tmp_path, share):
    torch.manual_seed(0)
    build_vae(z_dim=4, base_dim=4, decoder_base_dim=4).save_pretrained(tmp_path / "vae")
    tiny_wan.make_latents(tmp_path, Accelerator(cpu=True), range(1), range(1), minutes=10, clip_frames=5, pairs=share)
    for kind in ("stills", "clips", "settled-stills", "settled-clips"):
        captions = load_latents(tmp_path / kind)[1]
        assert sum(" and " in caption for caption in captions) == share * len(captions), kind


def train_small(run_dir, steps, **changes):
    settings = TrainSettings(steps, learning_rate=1e-3, warmup=2, save_minutes=1e9, **changes)
    return tiny_wan.train_transformer(run_dir, Accelerator(cpu=True), settings, FEW, size=SMALL)


def test_a_run_trains_resumes_and_exports(run_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    # the same six steps, once at a stretch and once in two calls; stills, frames and clips are all among them
    assert train_small(run_dir, 6, decay=0.0) == 6
    assert train_small(other, 3, decay=0.0) == 3
    assert train_small(other, 6, decay=0.0) == 6
    files = [(folder / "transformer.safetensors").read_bytes() for folder in (run_dir, other)]
    assert files[0] == files[1]
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("kept")
    assert export(run_dir, folder, GenerationDefaults(steps=3), SMALL) == 6
    assert (folder / "README.md").read_text() == "kept"
    assert json.loads((folder / DEFAULTS_FILE).read_text())["steps"] == 3
    loaded, (direct, _) = WanPipeline.from_pretrained(folder), assemble(run_dir, SMALL)
    statistics = json.loads((run_dir / "latents.json").read_text())
    assert loaded.vae.config.latents_mean == [*statistics["latents_mean"], *[0.0] * POSITION_CHANNELS]
    for name, value in direct.transformer.state_dict().items():
        torch.testing.assert_close(loaded.transformer.state_dict()[name].float(), value, atol=2e-3, rtol=2e-3)
    assert not list(tmp_path.glob("*.part"))


def test_training_goes_on_from_the_shipped_folder(shipped, tmp_path):
    adopt(tmp_path, SHIPPED)
    clip = training_clips(1, 5, 64, step_generator(0, 0))
    vae = tiny_wan.load_vae(tmp_path)
    with torch.no_grad():
        narrow, wide = vae.encode(clip).latent_dist.mode(), shipped.vae.encode(clip).latent_dist.mode()
        torch.testing.assert_close(narrow, wide[:, : narrow.shape[1]])
        torch.testing.assert_close(vae.decode(narrow).sample, shipped.vae.decode(wide).sample)
    tiny_wan.make_latents(tmp_path, Accelerator(cpu=True), range(0), range(1), minutes=10)
    mean, _ = latent_statistics(tmp_path)
    assert len(mean) + POSITION_CHANNELS == shipped.vae.config.z_dim
    settings = TrainSettings(1, learning_rate=1e-9, save_minutes=1e9)
    assert tiny_wan.train_transformer(tmp_path, Accelerator(cpu=True), settings, FEW, begin_with=SHIPPED) == 1
    trained, _ = assemble(tmp_path)
    for name, value in trained.transformer.state_dict().items():
        torch.testing.assert_close(value, shipped.transformer.state_dict()[name].float(), atol=1e-6, rtol=1e-6)


def test_only_a_pipeline_folder_can_be_gone_on_from(tmp_path):
    with pytest.raises(GenAttnError, match="without model_index.json; export one"):
        adopt(tmp_path / "run", tmp_path)


def test_the_command_line_trains_the_autoencoder_and_keeps_a_journal(tmp_path):
    arguments = ["train", "--run-dir", str(tmp_path / "run"), "--cpu", "--phases", "vae"]
    tiny_wan.main([*arguments, "--vae-steps", "1", "--vae-still-steps", "1"])
    assert (tmp_path / "run" / "vae" / "config.json").exists()
    entry = json.loads((tmp_path / "run" / tiny_card.JOURNAL).read_text())
    assert entry["phase"] == "vae"
    assert entry["steps"] == 1
    assert entry["device"].startswith("CPU")


def test_the_command_line_judges_a_pipeline_and_writes_its_card(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    entries = [
        {"phase": "latents", "minutes": 1.0, "device": "CPU x", "clips": 64, "stills": 64},
        {"phase": "transformer", "minutes": 3.0, "device": "CPU x", "steps": 7, "note": "Stopped early."},
    ]
    (tmp_path / tiny_card.JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    table = tmp_path / "quality.csv"
    arguments = ["evaluate", "--model", str(folder), "--cpu", "--count", "2", "--sampling-steps", "1"]
    tiny_wan.main([*arguments, "--csv", str(table), "--card-from", str(tmp_path), "--max-sequence-length", "32"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["split"] for row in rows] == ["all", "seen", "unseen"]
    assert len(table.read_text().splitlines()) == 4
    card = (folder / "README.md").read_text()
    assert "Trained on a CPU for 4 minutes" in card
    assert "| transformer | 7 | 3.0 | CPU x |" in card
    assert "64 clips" in card
    assert "Stopped early." in card


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: tiny_wan.load_vae(folder), "phase vae must come first"),
        (lambda folder: latent_statistics(folder), "phase latents must come first"),
        (lambda folder: assemble(folder), "must hold vae/config.json before it is exported"),
        (lambda folder: GenerationDefaults(frames=0), "sizes, frames, steps and fps must be >= 1"),
        (lambda folder: tiny_wan.main(["evaluate", "--model", str(folder)]), "must be a pipeline folder"),
    ],
)
def test_bad_input_is_refused(call, message, tmp_path):
    with pytest.raises(GenAttnError, match=message):
        call(tmp_path)


def test_exporting_as_another_size_is_refused(run_dir):
    train_small(run_dir, 1)
    with pytest.raises(GenAttnError, match="the weights must be of size"):
        assemble(run_dir, DenoiserSize(2, 12, 2, 24))


def test_the_shipped_folder_names_no_machine() -> None:
    for file in SHIPPED.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file
        assert "/tmp/" not in file.read_text(), file


def test_the_card_tells_every_share_of_pairs_once() -> None:
    entries = [
        {"phase": "latents", "options": ""},
        {"phase": "latents 2", "options": "--two-objects 0.5 --seed 1"},
        {"phase": "denoiser", "options": "--two-objects 0.9"},
        {"phase": "latents 3", "options": "--clips 9 --two-objects 0.5"},
        {"phase": "latents 4", "options": "--two-objects 0.25"},
    ]
    assert card._pairs([]) == "15 %"
    assert card._pairs(entries) == "15 %, later 50 %, later 25 %"
