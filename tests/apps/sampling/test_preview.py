"""The preview shows where the steps are heading, and is gone when the file is there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from genattn.apps.sampling.preview import StepPreview, clean_estimate
from genattn.pipelines.tiny.random.build import build_pipeline


def test_a_straight_line_ends_in_the_clean_sample() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(2, 1, 4, 3, 3)
    before, after = (clean * (1 - s) + noise * s for s in scheduler.sigmas[2:4])
    assert torch.allclose(clean_estimate(scheduler, 2, before, after), clean, atol=1e-5)
    assert clean_estimate(scheduler, 2, None, after) is after
    assert clean_estimate(DDIMScheduler(), 2, before, after) is after


@pytest.mark.parametrize("family", ["wan", "sd3", "cogvideox", "animatediff"])
def test_a_picture_while_it_runs(family: str, tmp_path: Path) -> None:
    pipe, call = build_pipeline(family)
    preview = StepPreview(tmp_path / "a.png", every=0)
    seen: list[np.ndarray] = []

    def step(*given: object) -> object:
        out = preview(*given)  # type: ignore[arg-type]
        with Image.open(preview.path) as picture:
            seen.append(np.asarray(picture))
        return out

    frames = pipe(**call | {"output_type": "np"}, callback_on_step_end=step)
    frames = frames.frames[0] if hasattr(frames, "frames") else frames.images
    assert len(seen) == call["num_inference_steps"]
    assert seen[-1].shape == frames[0].shape
    # the last preview is the first frame itself, up to what a video decoder makes of one latent alone
    assert np.abs(seen[-1] / 255 - frames[0]).mean() < 0.02
    assert preview.seconds > 0
    preview.remove()
    assert os.listdir(tmp_path) == []


def test_packed_latents_get_none(tmp_path: Path) -> None:
    pipe, call = build_pipeline("flux")
    pipe(**call, callback_on_step_end=StepPreview(tmp_path / "a.png", every=0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_preview_that_cannot_be_made_does_not_cost_the_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def fails(path: Path, *_: object) -> None:
        asked.append(path)
        raise error

    monkeypatch.setattr("genattn.apps.sampling.preview.write_image", fails)
    pipe, call = build_pipeline("sd3")
    pipe(**call, callback_on_step_end=StepPreview(tmp_path / "a.png", every=0))
    assert asked == [tmp_path / "a.png"], "and is not tried again"
