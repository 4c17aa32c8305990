"""The tiny AnimateDiff: a whole run at toy size, resumed, exported, loaded by stock diffusers and judged."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AnimateDiffPipeline

from genattn.errors import GenAttnError
from genattn.pipelines import tiny_animatediff as tiny
from genattn.pipelines.tiny_trainer import TrainSettings

SMALL = tiny.MotionSize((16, 16, 16, 16), heads=2, text_width=16)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of everything; a shard cut to eight clips."""
    folder = tmp_path_factory.mktemp("run")
    accelerator = Accelerator(cpu=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny, "SHARD", 8)
    patch.setattr(tiny, "STILL_BATCH", 4)
    patch.setattr(tiny, "CLIP_BATCH", 1)
    vae = tiny.build_vae
    patch.setattr(tiny, "build_vae", lambda: vae((8, 8, 8)))
    tiny.train_vae(folder, accelerator, TrainSettings(2))
    assert tiny.make_latents(folder, accelerator, range(1), 5.0) == 1
    tiny.train_unet(folder, accelerator, TrainSettings(1), 1, SMALL)
    done = tiny.train_unet(folder, accelerator, TrainSettings(3), 1, SMALL)
    assert done == 3
    patch.undo()
    return folder


def test_latents_are_scaled_to_unit_spread(run_dir: Path) -> None:
    latents, captions = tiny.load_latents(run_dir / "clips")
    assert latents.shape == (8, 4, tiny.FRAMES, 16, 16)
    assert len(captions) == 8
    scale = json.loads((run_dir / "scale.json").read_text())["scaling_factor"]
    assert float(latents.float().std()) * scale == pytest.approx(1.0, rel=1e-3)
    assert tiny.load_vae(run_dir).config.scaling_factor == pytest.approx(scale)


def test_export_is_a_stock_folder(run_dir: Path, tmp_path: Path) -> None:
    assert tiny.export(run_dir, tmp_path / "tiny-animatediff", SMALL) == 3
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path / "tiny-animatediff").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
    frames = pipe("a red circle moves right on a dark background", **call, output_type="np").frames[0]
    assert frames.shape == (4, 32, 32, 3)
    card = (tmp_path / "tiny-animatediff" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "3 steps" in card
    defaults = json.loads((tmp_path / "tiny-animatediff" / "genattn_defaults.json").read_text())
    assert defaults["frames"] == tiny.FRAMES
    before = pipe.unet.state_dict()
    for name, value in pipe.motion_adapter.state_dict().items():
        assert torch.equal(value, before[name])


def test_full_size_stays_below_its_limit() -> None:
    vocabulary = len(tiny.build_clip_tokenizer())
    model, vae = tiny.TinyMotion(vocabulary), tiny.build_vae()
    halves = sum(
        p.numel() for m in (model.unet, vae, tiny.motion_adapter_of(model.unet, tiny.MotionSize())) for p in m.parameters()
    )
    whole = sum(p.numel() for p in model.text_encoder.parameters())
    assert 2 * halves + 4 * whole < 15_000_000
    guided = [n for n in model.unet.attn_processors if "up_blocks" in n and "motion_modules" in n]
    assert {n.split(".")[1] for n in guided} == {"0", "1", "2", "3"}


def test_velocity_loss_is_that_of_the_velocity() -> None:
    """A model that knows the answer has no loss; one that answers nothing has that of the velocity's square."""
    scheduler = tiny.build_scheduler()
    latents = torch.randn(6, 4, 2, 4, 4)
    ids, empty = torch.zeros(6, 24, dtype=torch.long), torch.zeros(24, dtype=torch.long)
    seen: dict[str, torch.Tensor] = {}

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            share = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
            noise = (noisy - share.sqrt() * latents) / (1 - share).sqrt()
            seen["timestep"] = timestep
            return share.sqrt() * noise - (1 - share).sqrt() * latents

    generator = torch.Generator().manual_seed(0)
    loss = tiny.velocity_loss(Oracle(), scheduler, latents, ids, empty, generator)
    assert float(loss) < 1e-6
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6  # pure noise at the end
    assert seen["timestep"].max() < 1000


def test_missing_phases_are_named(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="phase vae must come first"):
        tiny.load_vae(tmp_path)
    with pytest.raises(GenAttnError, match="a run must hold vae/config.json"):
        tiny.assemble(tmp_path)


def test_weights_of_another_size_are_refused(run_dir: Path) -> None:
    with pytest.raises(GenAttnError, match="the weights must be of size"):
        tiny.assemble(run_dir)


@pytest.mark.parametrize("wrong", [{"channels": (12, 16, 16, 16)}, {"heads": 3}, {"layers": 0}])
def test_sizes_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(GenAttnError, match="channels must be multiples of 8"):
        tiny.MotionSize(**wrong)  # type: ignore[arg-type]


def test_command_line_passes_its_settings_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: dict[str, tuple] = {}
    for name in ("train_vae", "make_latents", "train_unet", "export"):
        monkeypatch.setattr(tiny, name, lambda *args, name=name: called.update({name: args}))
    tiny.main(["train", "--run-dir", str(tmp_path), "--cpu", "--steps", "7", "--still-steps", "3", "--shards", "2", "5"])
    assert called["make_latents"][2] == range(2, 5)
    assert called["train_unet"][2].steps == 7
    assert called["train_unet"][3] == 3
    tiny.main(["export", "--run-dir", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert called["export"] == (tmp_path, tmp_path / "out")
