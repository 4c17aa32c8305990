"""The training loss of a stock video denoiser, by its own schedule and its own kind of prediction.

    x = alpha x_0 + sigma noise        flow: target noise - x_0        epsilon: noise        v: alpha noise - sigma x_0

Noise levels are drawn from the grid that sampling visits: for rectified flow logit-normal before the scheduler's shift
(Esser et al., arXiv 2403.03206), otherwise uniform.
"""

from dataclasses import dataclass

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.places import place_weight
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid

LEVELS = 1000


@dataclass(frozen=True)
class TrainingDraw:
    """What is random in one step: noise [B, C, F, h, w] and levels int64 [B] into the grid."""

    noise: torch.Tensor
    levels: torch.Tensor


def training_grid(base: FrameDenoiser, latents: torch.Size | tuple[int, ...]) -> NoiseGrid:
    """The noise levels of training for latents [C, F, h, w]."""
    _, frames, height, width = latents
    return base.solver(LEVELS, (frames, height, width)).grid


def draw(grid: NoiseGrid, shape: tuple[int, ...], generator: torch.Generator) -> TrainingDraw:
    """Noise and levels for latents of `shape` [B, C, F, h, w], from a CPU generator."""
    if grid.is_flow:
        place = torch.sigmoid(torch.randn(shape[0], generator=generator))
    else:
        place = torch.rand(shape[0], generator=generator)
    levels = (place * grid.num_levels).long().clamp(0, grid.num_levels - 1)
    return TrainingDraw(torch.randn(shape, generator=generator), levels)


def target(grid: NoiseGrid, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """What the model should answer: same shape as latents [B, C, F, h, w].

    Raises GenAttnError for a kind of prediction that is not known.
    """
    alpha, sigma = (_at(table, levels, latents) for table in (grid.alpha, grid.sigma))
    answers = {
        "flow_prediction": lambda: noise - latents,
        "epsilon": lambda: noise,
        "v_prediction": lambda: alpha * noise - sigma * latents,
        "sample": lambda: latents,
    }
    if grid.prediction not in answers:
        raise GenAttnError(f"the scheduler's prediction must be one of {', '.join(answers)}, got {grid.prediction!r}")
    return answers[grid.prediction]()


def denoising_loss(
    base: FrameDenoiser, grid: NoiseGrid, latents: torch.Tensor, embeds: Embeds, random: TrainingDraw
) -> torch.Tensor:
    """Mean squared error of one forward, 0-dim float32. latents [B, C, F, h, w] clean; embeds with batch B.

    Weighed as in the model's own training where latents hold channels of place.
    """
    noise = random.noise.to(latents.device)
    alpha, sigma = (_at(table, random.levels, latents) for table in (grid.alpha, grid.sigma))
    noisy = alpha * latents + sigma * noise
    times = grid.model_timesteps(random.levels)[:, None].expand(-1, latents.shape[2]).to(latents.device)
    where = Pass("cond", 0, LEVELS, float(sigma.max()))
    answer = base.predict(noisy, times, embeds, where)
    error = (answer.float() - target(grid, latents, noise, random.levels)).square()
    weight = place_weight(latents)
    return (error if weight is None else error * weight).mean()


def _at(table: torch.Tensor, levels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return table[levels + 1].to(like).view(-1, 1, 1, 1, 1)
