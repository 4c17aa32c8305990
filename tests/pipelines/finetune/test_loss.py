"""What a model is trained to answer is what its scheduler reads, and captions are left out as often as asked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.cache import ClipSize
from genattn.pipelines.finetune.loss import TrainingDraw, denoising_loss, target
from genattn.pipelines.finetune.tune import Batches, FinetuneSettings
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid, grid_from_alphas

LEVELS = torch.tensor([0, 3, 6])


def _draws() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, 4, 3, 3, dtype=torch.float64), torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)


def _vp_grid(prediction: str) -> tuple[Any, NoiseGrid]:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(7)
    return scheduler, grid_from_alphas(scheduler, scheduler.timesteps, scheduler.final_alpha_cumprod)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_of_diffusion_is_the_schedulers_own(prediction: str) -> None:
    latents, noise = _draws()
    scheduler, grid = _vp_grid(prediction)
    times = grid.model_timesteps(LEVELS).long()
    found = target(grid, latents, noise, LEVELS)
    noisy = scheduler.add_noise(latents, noise, times)
    if prediction == "v_prediction":
        torch.testing.assert_close(found, scheduler.get_velocity(latents, noise, times), atol=1e-6, rtol=1e-6)
    for at, time in enumerate(times):
        # the scheduler, told the target, finds the clean latents
        clean = scheduler.step(found[at], time, noisy[at]).pred_original_sample
        torch.testing.assert_close(clean, latents[at], atol=1e-4, rtol=1e-4)


def test_the_target_of_rectified_flow_leads_to_the_clean_latents() -> None:
    latents, noise = _draws()
    sigma = torch.linspace(0, 1, 8, dtype=torch.float64)
    grid = NoiseGrid(1 - sigma, sigma, sigma * 1000, "flow_prediction")
    found = target(grid, latents, noise, LEVELS)
    at = sigma[LEVELS + 1].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close((1 - at) * latents + at * noise - at * found, latents)


def test_every_clip_of_a_batch_is_noised_at_its_own_level_in_all_its_frames() -> None:
    latents, noise = _draws()
    sigma = torch.linspace(0, 1, 8, dtype=torch.float64)
    grid = NoiseGrid(1 - sigma, sigma, sigma * 1000, "flow_prediction")
    seen: list[Any] = []

    def predict(noisy: torch.Tensor, times: torch.Tensor, embeds: Any, where: Any) -> torch.Tensor:
        seen.extend((noisy, times))
        return torch.zeros_like(noisy)

    base: Any = SimpleNamespace(predict=predict)
    loss = denoising_loss(base, grid, latents, {}, TrainingDraw(noise, LEVELS))
    at = sigma[LEVELS + 1].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(seen[0], (1 - at) * latents + at * noise)
    torch.testing.assert_close(seen[1], grid.model_timesteps(LEVELS)[:, None].repeat(1, latents.shape[2]))
    torch.testing.assert_close(loss, (noise - latents).square().mean())


def test_an_unknown_prediction_is_refused() -> None:
    latents, noise = _draws()
    grid = NoiseGrid(torch.ones(8), torch.ones(8), torch.ones(8), "score")
    with pytest.raises(GenAttnError, match="must be one of flow_prediction, epsilon, v_prediction, sample, got 'score'"):
        target(grid, latents, noise, LEVELS)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (1.0, 64, 64), (0.5, 16, 48)])
def test_captions_are_left_out_as_often_as_asked(tmp_path: Path, share: float, low: int, high: int) -> None:
    file = tmp_path / "clip.safetensors"
    save_file({"latents": torch.zeros(1, 1, 2, 2), "text.prompt": torch.ones(1, 3)}, file)
    settings = FinetuneSettings(ClipSize(1, 16, 16), batch=64, caption_dropout=share)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
    batches = Batches([file], {"prompt": torch.zeros(1, 3)}, settings, accelerator)
    latents, embeds = batches.draw(torch.Generator().manual_seed(0))
    assert latents.shape == (64, 1, 1, 2, 2)
    assert low <= int((embeds["prompt"] == 0).all(1).sum()) <= high
    assert set(embeds["prompt"].unique().tolist()) <= {0.0, 1.0}
