"""Channels of place in fine-tuning: filled in, stretched over any length, weighed as in the model's own training."""

from pathlib import Path

import pytest
import torch

from genattn.pipelines.finetune.cache import ClipSize, LatentCache
from genattn.pipelines.finetune.loss import denoising_loss, draw, training_grid
from genattn.pipelines.finetune.places import place_weight, with_places
from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.pipelines.training.places import POSITION_AMPLITUDE, POSITION_CHANNELS, object_weight, with_positions

CONTENTS = 6


def encoded(frames: int) -> torch.Tensor:
    latents = torch.randn(2, CONTENTS, frames, 4, 6, generator=torch.Generator().manual_seed(0))
    return torch.cat([latents, torch.zeros(2, POSITION_CHANNELS, frames, 4, 6)], 1)


def test_empty_channels_are_filled_as_the_model_was_trained() -> None:
    torch.testing.assert_close(with_places(encoded(8)), with_positions(encoded(8)[:, :CONTENTS]))


@pytest.mark.parametrize("frames", [5, 15, 29])
def test_places_are_stretched_over_the_clip(frames: int) -> None:
    placed = with_places(encoded(frames))
    half_wave = placed[0, CONTENTS, :, 0, 0]
    assert torch.equal(placed[:, :CONTENTS], encoded(frames)[:, :CONTENTS])
    assert bool((half_wave.diff() < 0).all()), "one half wave from the first frame to the last"
    torch.testing.assert_close(half_wave, -half_wave.flip(0), atol=1e-4, rtol=1e-4)


def test_latents_of_other_models_go_through() -> None:
    for other in (torch.randn(1, 16, 3, 4, 4), torch.randn(1, 4, 3, 4, 4), torch.zeros(1, 17, 3, 4, 4)):
        assert with_places(other) is other
        assert place_weight(other) is None


def test_contents_and_places_weigh_what_they_weighed() -> None:
    """Unweighed, waves of amplitude 6 would be nearly all of the loss."""
    latents = with_places(encoded(15))
    weight = place_weight(latents)
    assert weight is not None
    error = torch.rand(latents.shape, generator=torch.Generator().manual_seed(1))
    contents = (error[:, :CONTENTS] * object_weight(latents[:, :CONTENTS])).mean()
    places = error[:, CONTENTS:].mean() / POSITION_AMPLITUDE**2
    torch.testing.assert_close((error * weight).mean(), contents + 0.5 * places)


def test_the_shipped_model_is_trained_on_places_at_a_longer_length(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained("assets/tiny-wan")
    base = frame_denoiser(pipe)
    frames = torch.randint(0, 255, (17, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = LatentCache(base, tmp_path, ClipSize(17, 32, 32)).encode_frames(frames)[None]
    assert latents.shape == (1, 17, 5, 8, 8)
    assert bool((latents[:, -POSITION_CHANNELS:].flatten(2).abs().amax(-1) > 1).all())
    assert place_weight(latents) is not None


def test_the_loss_of_other_models_is_plain() -> None:
    base = frame_denoiser(build_pipeline("wan")[0])
    latents = torch.randn(1, base.channels, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    grid = training_grid(base, latents[0].shape)
    random = draw(grid, tuple(latents.shape), torch.Generator().manual_seed(1))
    embeds = base.encode_prompt("a", None, guided=False).cond
    with torch.no_grad():
        loss = denoising_loss(base, grid, latents, embeds, random)
        base.predict = lambda *args: torch.zeros_like(latents)  # type: ignore[method-assign]
        nothing = denoising_loss(base, grid, latents, embeds, random)
    torch.testing.assert_close(nothing, (random.noise - latents).square().mean())
    assert torch.isfinite(loss)
