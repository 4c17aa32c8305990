"""One step of the sampler for latents that each stand at their own level, vectorised over the frames.

    clean, noise = what the model means at each level        (NoiseGrid)
    next = alpha' clean + sigma' (sqrt(1 - share^2) noise + share fresh)

DDIM (arXiv 2010.02502, eq. 12 and 16), flow-match Euler with a share of fresh noise, and consistency steps (arXiv
2310.04378) differ in `share` only; the multistep solvers live in `multistep_solvers`. Each equals its stock scheduler when
all frames share a level.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid, fresh_scheduler, grid_from_alphas, grid_from_sigmas

State = dict[str, torch.Tensor]


class FrameSolver(ABC):
    """A sampler by level. grid: its noise levels. needs_noise: whether `step` mixes in fresh noise."""

    def __init__(self, grid: NoiseGrid, needs_noise: bool = False) -> None:
        self.grid = grid
        self.needs_noise = needs_noise

    @property
    def num_levels(self) -> int:
        """Number of denoising steps."""
        return self.grid.num_levels

    def empty_state(self, latents: torch.Tensor) -> State:
        """What the solver remembers about latents [B, C, F, H, W] that it has never stepped."""
        return {}

    @abstractmethod
    def step(
        self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor, state: State, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """One level down for every frame: sample, prediction and noise [B, C, F, H, W], levels int64 [F], each >= 0."""

    def direction_gain(self, levels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """How much of the model's noise direction a step from each level puts into the result, [1, 1, F, 1, 1]."""
        return self.grid.at(self.grid.sigma, levels - 1, like)

    def settings(self) -> dict[str, Any]:
        """JSON-ready; two solvers with equal settings do the same."""
        grid = self.grid
        return {
            "solver": type(self).__name__,
            "num_levels": self.num_levels,
            "prediction": grid.prediction,
            "timesteps": [round(float(t), 4) for t in grid.timesteps],
            "sigmas": [round(float(s), 7) for s in grid.sigma],
        }


class SingleStepSolver(FrameSolver):
    """DDIM and flow-match Euler. eta: share of fresh noise, 0 (deterministic) to 1 (DDPM, or full re-noising for flow).

    target_alpha, target_sigma: where a step from level i leads, rows as in the grid; the next cleaner level when left out.
    skip, out: the boundary scalings of consistency models, per row; 0 and 1 when left out.
    """

    def __init__(
        self,
        grid: NoiseGrid,
        eta: float = 0.0,
        *,
        target: tuple[torch.Tensor, torch.Tensor] | None = None,
        boundary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if not 0 <= eta <= 1:
            raise GenAttnError(f"eta must be 0 (deterministic) to 1 (all noise fresh), got {eta}")
        super().__init__(grid, needs_noise=eta > 0)
        self.eta = eta
        self.boundary = boundary
        cleaner = (grid.alpha.roll(1), grid.sigma.roll(1))
        goal: tuple[torch.Tensor, torch.Tensor] = cleaner if target is None else target
        self.target_alpha, self.target_sigma = goal
        self.share = self._fresh_share()

    def _fresh_share(self) -> torch.Tensor:
        if self.eta == 0 or self.grid.is_flow or self.boundary is not None:
            return torch.full_like(self.grid.alpha, self.eta)
        # DDIM, eq. 16: the fresh part is eta * sqrt((1-a')/(1-a)) * sqrt(1-a/a'), here as a share of sqrt(1-a')
        a, target = self.grid.alpha.square(), self.target_alpha.square()
        return self.eta * ((1 - a / target) / (1 - a)).clamp(0, 1).sqrt()

    def step(
        self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor, state: State, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """See FrameSolver.step."""
        grid = self.grid
        if self.needs_noise and noise is None:
            raise GenAttnError(f"a step with eta = {self.eta} needs noise, got None; draw it with frame_noise")
        clean, direction = grid.clean(sample, prediction, levels), grid.noise(sample, prediction, levels)
        if self.boundary is not None:
            skip, out = (grid.at(table, levels, sample) for table in self.boundary)
            clean = out * clean + skip * sample
        if noise is not None and self.needs_noise:
            share = grid.at(self.share, levels, sample)
            direction = (1 - share.square()).clamp(min=0).sqrt() * direction + share * noise
        alpha, sigma = grid.at(self.target_alpha, levels, sample), grid.at(self.target_sigma, levels, sample)
        return (alpha * clean + sigma * direction).to(sample.dtype), {}

    def direction_gain(self, levels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See FrameSolver.direction_gain; the fresh share of the noise is no direction of the model's."""
        share = self.grid.at(self.share, levels, like)
        return self.grid.at(self.target_sigma, levels, like) * (1 - share.square()).clamp(min=0).sqrt()

    def settings(self) -> dict[str, Any]:
        """See FrameSolver.settings."""
        return {**super().settings(), "eta": self.eta, "consistency": self.boundary is not None}


def _ddim(scheduler: Any, copy: Any, eta: float, off_grid: bool) -> SingleStepSolver:
    grid = grid_from_alphas(copy, copy.timesteps, copy.final_alpha_cumprod)
    if not off_grid:
        return SingleStepSolver(grid, eta)
    # the stock step goes to t - T // S, which is no level of the queue for linspace and some trailing spacings
    before = grid.timesteps[1:].long() - copy.config.num_train_timesteps // copy.num_inference_steps
    target = torch.where(before >= 0, copy.alphas_cumprod.double()[before.clamp(min=0)], copy.final_alpha_cumprod.double())
    target = torch.cat([target[:1], target])
    return SingleStepSolver(grid, eta, target=(target.sqrt(), (1 - target).sqrt()))


def _consistency(copy: Any) -> SingleStepSolver:
    order = copy.timesteps.flip(0)
    # the last stock step adds no noise: it leads to a level of pure signal
    grid = grid_from_alphas(copy, copy.timesteps, torch.ones(()))
    scaled = torch.cat([torch.zeros(1), order]).double() * copy.config.timestep_scaling
    skip, out = 0.25 / (scaled.square() + 0.25), scaled / (scaled.square() + 0.25).sqrt()
    return SingleStepSolver(grid, 1.0, boundary=(skip, out))


def solver_from_scheduler(
    scheduler: Any, num_levels: int | None = None, *, eta: float | None = None, off_grid: bool = False, **schedule: Any
) -> FrameSolver:
    """The by-level solver of a stock scheduler.

    scheduler: DDIM, CogVideoX DDIM, LCM, flow-match Euler, flow-match LCM, DPM-Solver++ (2M) or UniPC. num_levels: denoising
    steps.
    eta: share of fresh noise for DDIM and flow-match Euler; 0 when left out (1 where the scheduler itself samples
    stochastically).
    off_grid: let DDIM step to t - T // S as the stock code does, also where that is no level of the queue.
    schedule: custom `timesteps`, `sigmas` or `mu`.
    """
    from genattn.pipelines.long_video.solvers.multistep_solvers import DPMSolver2M, UniPC

    name = type(scheduler).__name__
    builders = {
        "DDIMScheduler": lambda copy: _ddim(scheduler, copy, eta or 0.0, off_grid),
        "CogVideoXDDIMScheduler": lambda copy: _ddim(scheduler, copy, eta or 0.0, off_grid),
        "LCMScheduler": _consistency,
        "FlowMatchEulerDiscreteScheduler": lambda copy: SingleStepSolver(grid_from_sigmas(copy), _flow_eta(copy, eta)),
        "FlowMatchLCMScheduler": lambda copy: SingleStepSolver(grid_from_sigmas(copy), 1.0),
        "DPMSolverMultistepScheduler": DPMSolver2M.from_scheduler,
        "UniPCMultistepScheduler": UniPC.from_scheduler,
    }
    if name not in builders:
        raise GenAttnError(f"no by-level solver for {name}; set pipe.scheduler to one of {', '.join(builders)}")
    if eta is not None and name not in ("DDIMScheduler", "CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        raise GenAttnError(f"eta belongs to DDIM and flow-match Euler, got eta={eta} with {name}; leave it out")
    copy = fresh_scheduler(scheduler, num_levels, **schedule)
    solver: FrameSolver = builders[name](copy)
    if num_levels is not None and solver.num_levels != num_levels:
        raise GenAttnError(
            f"the scheduler made {solver.num_levels} steps of the {num_levels} asked for; pass num_levels={solver.num_levels}"
        )
    return solver


def _flow_eta(copy: Any, eta: float | None) -> float:
    if eta is None:
        return 1.0 if getattr(copy.config, "stochastic_sampling", False) else 0.0
    return eta
