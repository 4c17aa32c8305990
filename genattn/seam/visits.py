"""Which entries of its scheduler's list a pipeline visits in this run.

Image-to-image and video-to-video start in the middle, an ensemble of experts stops there, and a handle may come in the middle
of a run. Pipelines tell the number of timesteps they visit (`num_timesteps`); schedulers tell where they stand (`step_index`,
or `begin_index` before the first step), but not all do, so the timestep of the first forward is looked for in the list.
What a pipeline tells is of its last call, so it counts only while that call runs.
"""

from typing import Any

import torch

_EXACT, _ROUNDED = 1e-5, 4e-3  # of the largest timestep; the second is bfloat16's


def visits(
    pipe: Any, timestep: float | None, rising: bool = False, runs: bool = True
) -> tuple[list[tuple[float, float | None]], int]:
    """([(timestep, sigma) of every distinct timestep in the order of the loop], index of the first forward in it).

    pipe: with a scheduler; nothing is known without one. timestep: what the denoiser is told, in its own scale; rising: whether
    that grows while the scheduler's falls. runs: whether a call of `pipe` is going on; a loop of the user's own may use its
    scheduler, or another one, of which nothing is known.
    """
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or not timesteps.numel():
        return [], 0
    if not runs and not is_listed(pipe, timestep, rising):
        return [], 0
    values, tells = timesteps.tolist(), pipe if runs else None
    count = _count(tells, len(values))
    start, is_sure = _start(tells, scheduler, values, count, timestep, rising)
    first = start if count is None else min(start, len(values) - count)
    last = len(values) if count is None else first + count
    sigmas = _sigmas(scheduler, timesteps) if is_sure or count in (None, len(values)) else []
    kept: list[tuple[float, float | None]] = []
    place = 0
    for index in range(first, last):
        if not kept or kept[-1][0] != values[index]:
            kept.append((values[index], sigmas[index] if index < len(sigmas) else None))
        if index == start:
            place = len(kept) - 1
    return kept, place


def is_listed(pipe: Any, timestep: float | None, rising: bool = False) -> bool:
    """Whether the scheduler's list has `timestep`, up to rounding; true where there is nothing to compare."""
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timestep is None or not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or not timesteps.numel():
        return True
    return _compare(None, scheduler, timesteps.tolist(), timestep, rising) is not None


def _count(pipe: Any, most: int) -> int | None:
    """How many entries the pipeline says it visits."""
    told = getattr(pipe, "_num_timesteps", None)
    return told if isinstance(told, int) and 0 < told <= most else None


def _start(
    pipe: Any, scheduler: Any, values: list[float], count: int | None, timestep: float | None, rising: bool
) -> tuple[int, bool]:
    """(index of the entry that runs now, whether the timestep confirms it)."""
    indices = (getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None))
    told = [int(index) for index in indices if index is not None]
    guesses = [index for index in (*told, len(values) - (count or len(values)), 0) if 0 <= index < len(values)]
    found = _compare(pipe, scheduler, values, timestep, rising)
    if found is None:
        return guesses[0], False
    errors, slack = found
    fitting = [index for index in guesses if errors[index] <= slack]
    return (fitting[0] if fitting else errors.index(min(errors))), True


def _compare(
    pipe: Any, scheduler: Any, values: list[float], timestep: float | None, rising: bool
) -> tuple[list[float], float] | None:
    """(distance of every entry from the timestep that runs, the distance that is rounding); None where nothing is near."""
    current = getattr(pipe, "_current_timestep", None)
    if isinstance(current, torch.Tensor):
        current = float(current) if current.numel() == 1 else None
    if current is not None and current in values:
        return [abs(value - current) for value in values], 0.0
    if timestep is None:
        return None
    train = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
    scales = [values, [value / train for value in values]]
    if rising:
        scales = [[train - value for value in values], [1 - value / train for value in values], *scales]
    best: tuple[float, list[float], float] | None = None
    for scaled in scales:
        size = max(abs(value) for value in scaled) or 1.0
        errors = [abs(value - timestep) for value in scaled]
        if best is None or min(errors) / size < best[0]:
            best = (min(errors) / size, errors, size)
    assert best is not None
    nearest, errors, size = best
    if nearest > _ROUNDED:
        return None
    return errors, size * (_EXACT if nearest <= _EXACT else _ROUNDED + nearest)


def _sigmas(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() >= timesteps.numel():
        return sigmas.flatten().tolist()
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(products, torch.Tensor) and not timesteps.is_floating_point():
        kept = products[timesteps.long().cpu().clamp(0, products.numel() - 1)]
        return ((1 - kept) / kept).sqrt().tolist()
    return []
