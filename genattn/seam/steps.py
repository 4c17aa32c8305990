"""Where the sampling loop stands: step, number of steps, noise level, and the start of a new run, read at the denoiser's root.

A step is a change of the timestep, so that two guidance passes share one and a second-order sampler's two evaluations at one
noise level share one. The number of steps is the number of distinct timesteps the scheduler will visit. A run starts when the
scheduler was given new timesteps, or when the timestep jumps back. Block caches skip layers, never the root, so nothing is
counted there.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Position:
    """step: 0-based. num_steps: None when nobody tells. sigma: None likewise. is_new_run: first forward of a run."""

    step: int
    num_steps: int | None
    sigma: float | None
    is_new_run: bool


class StepTracker:
    """Shared by all denoisers of one pipeline, so that two experts count as one run."""

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._plan: Any = None
        self._timestep: float | None = None
        self._step = -1
        self._repeats = 0
        self._visits: list[tuple[float, float | None]] = []

    @property
    def pipe(self) -> Any:
        """The pipeline, None for a bare model."""
        return self._pipe()

    @property
    def has_pipe(self) -> bool:
        """Whether a scheduler can be asked."""
        return self._pipe() is not None

    def observe(self, timestep: float | None, told: dict[str, Any], num_steps: int | None, rising: bool = False) -> Position:
        """One forward of a denoiser at `timestep`; `told` is what the pipeline put into its cache context."""
        plan = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)
        is_new = self._is_new_run(timestep, plan, rising)
        if is_new:
            self._plan, self._step, self._timestep = plan, -1, None
            self._visits = _visits(getattr(self._pipe(), "scheduler", None))
        self._repeats += 1
        if timestep is None or timestep != self._timestep:
            self._step += 1
            self._repeats = 0
        self._timestep = timestep
        total = told.get("num_inference_steps") or num_steps or len(self._visits) or None
        step = self._step
        if told.get("step_index") is not None and (total is None or told["step_index"] < total):
            step = told["step_index"]
        if total is not None and step >= total:  # more forwards than were announced: the announcement was wrong
            total = None
        sigma = told.get("sigma")
        if sigma is None and step < len(self._visits):
            sigma = self._visits[step][1]
        return Position(step, total, None if sigma is None else float(sigma), is_new)

    def guess_pass(self, cfg: str | None) -> str | None:
        """Name of the pass for pipelines without cache contexts; cfg: "batched", "two_pass" or None when it is not known."""
        guided = getattr(self._pipe(), "do_classifier_free_guidance", None)
        if cfg is None or not isinstance(guided, bool):
            return None
        if not guided:
            return "cond"
        return "cond_uncond" if cfg == "batched" else ("cond", "uncond")[self._repeats % 2]

    def _is_new_run(self, timestep: float | None, plan: Any, rising: bool) -> bool:
        if self._step < 0 or plan is not self._plan:
            return True
        if timestep is None or self._timestep is None:
            return False
        return timestep < self._timestep if rising else timestep > self._timestep


def _visits(scheduler: Any) -> list[tuple[float, float | None]]:
    """(timestep, sigma) of every distinct timestep in the order in which the loop visits them; empty when unknown."""
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
        return []
    start = getattr(scheduler, "begin_index", None) or 0
    values = timesteps[start:].tolist()
    sigmas = _sigmas(scheduler, timesteps)[start:]
    kept: list[tuple[float, float | None]] = []
    for index, value in enumerate(values):
        if not kept or kept[-1][0] != value:
            kept.append((value, sigmas[index] if index < len(sigmas) else None))
    return kept


def _sigmas(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() >= timesteps.numel():
        return sigmas.flatten().tolist()
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(products, torch.Tensor) and not timesteps.is_floating_point():
        kept = products[timesteps.long().cpu().clamp(0, products.numel() - 1)]
        return ((1 - kept) / kept).sqrt().tolist()
    return []
