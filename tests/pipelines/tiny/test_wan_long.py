"""The recipe of tiny-wan with a token per latent and longer clips: what tiny-wan-long was made by."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file

from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny import wan as tiny_wan
from genattn.pipelines.tiny.card import JOURNAL
from genattn.pipelines.tiny.curriculum import Curriculum
from genattn.pipelines.tiny.denoiser import DenoiserSize
from genattn.pipelines.tiny.export import DEFAULTS_FILE
from genattn.pipelines.tiny.resume import adopt
from genattn.pipelines.training.trainer import TrainSettings

ASSETS = Path(__file__).resolve().parents[3] / "assets"


@pytest.fixture
def run_dir(tmp_path):
    """A run begun with tiny-wan, with invented latents of four frames."""
    adopt(tmp_path, ASSETS / "tiny-wan")
    (tmp_path / JOURNAL).unlink()
    captions = json.dumps(["a red circle moves right on a dark background"] * 2)
    for kind in ("stills", "settled-stills", "clips", "settled-clips"):
        frames = 4 if "clips" in kind else 1
        latents = torch.randn(2, 6, frames, 4, 4, generator=torch.Generator().manual_seed(frames))
        (tmp_path / kind).mkdir()
        save_file({"latents": latents.half()}, tmp_path / kind / "latents-00000.safetensors", metadata={"captions": captions})
    return tmp_path


def weights(run_dir):
    with safe_open(run_dir / "transformer.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("model.")}  # noqa: SIM118


def test_the_command_line_trains_a_finer_longer_model_and_says_how_in_the_journal(run_dir, tmp_path):
    arguments = ["train", "--run-dir", str(run_dir), "--cpu", "--begin-with", str(ASSETS / "tiny-wan"), "--frames", "13"]
    arguments += ["--patch", "1", "--still-steps", "1", "--still-batch", "1", "--frame-batch", "2", "--clip-batch", "1"]
    arguments += ["--window-frames", "2", "--frame-steps", "3", "--steps", "4", "--stage", "a token per latent"]
    (run_dir / JOURNAL).write_text("")
    tiny_wan.main([*arguments, "--phases", "transformer"])
    assert weights(run_dir)["model.transformer.patch_embedding.weight"].shape == (128, 17, 1, 1, 1)
    entry = json.loads((run_dir / JOURNAL).read_text())
    assert entry["phase"] == "transformer: a token per latent"
    assert entry["steps"] == 4
    assert str(tmp_path) not in entry["options"]
    again = tiny_wan.build_parser().parse_args(["train", "--run-dir", "x", *shlex.split(entry["options"])])
    assert (again.frames, again.patch, again.steps, again.cpu) == (13, 1, 4, True)
    tiny_wan.main([*arguments, "--phases", "export", "--out", str(tmp_path / "made"), "--sampling-steps", "5"])
    assert json.loads((tmp_path / "made" / DEFAULTS_FILE).read_text())["frames"] == 13
    assert json.loads((tmp_path / "made" / "transformer" / "config.json").read_text())["patch_size"] == [1, 1, 1]


def test_training_through_a_pattern_trains_through_it_and_leaves_it_behind(run_dir, monkeypatch):
    curriculum = Curriculum(0, 0, still_batch=1, clip_batch=1, clip_frames=4)
    models, kinds = [], []

    def train(model, *arguments):
        models.append(model)
        kinds.append(type(model.transformer.blocks[0].attn1.processor))
        return 7

    monkeypatch.setattr(tiny_wan, "train", train)
    for pattern in (None, RadialPattern(decay=0.3, floor=0)):
        done = tiny_wan.train_transformer(
            run_dir, Accelerator(cpu=True), TrainSettings(1), curriculum, DenoiserSize(patch=1), pattern=pattern
        )
        assert done == 7
    assert kinds[0] is WanAttnProcessor
    assert kinds[1] is not WanAttnProcessor
    assert type(models[1].transformer.blocks[0].attn1.processor) is WanAttnProcessor
