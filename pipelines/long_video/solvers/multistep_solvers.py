"""Multistep samplers by level: DPM-Solver++ (2M) and UniPC, with the history of every latent riding in the queue.

A stock multistep scheduler keeps one history for the whole clip; in a queue every latent has its own, and some (those of the
starting clip) begin half-way down with none. So the history is a set of tensors with a frame axis, and the order is chosen
per frame. DPM-Solver++: arXiv 2211.01095; UniPC: arXiv 2302.04867. Half log signal-to-noise: lambda = log alpha - log sigma.
"""

from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, State
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid, grid_from_sigmas


def _shifted(table: torch.Tensor, by: int) -> torch.Tensor:
    # row r of the result is row r + by of the table; rows past an end repeat it (they are never used)
    rows = (torch.arange(len(table)) + by).clamp(0, len(table) - 1)
    return table[rows]


def _check(copy: Any, orders: tuple[int, ...]) -> None:
    config, name = copy.config, type(copy).__name__
    if config.solver_order not in orders:
        raise GenAttnError(
            f"solver_order must be one of {orders} in a queue, got {config.solver_order} in {name}; set it in the config"
        )
    if getattr(config, "thresholding", False):
        raise GenAttnError(f"thresholding=True of {name} looks at whole clips and has no per-frame form; set it False")


class _Multistep(FrameSolver):
    # lam[r], h[r] = lambda of the target minus lambda of this level, back[r] = lambda of this level minus that of the one
    # before
    def __init__(self, grid: NoiseGrid, order: int) -> None:
        super().__init__(grid)
        self.order = order
        self.lam = grid.alpha.log() - grid.sigma.log()
        self.h = _shifted(self.lam, -1) - self.lam
        self.back = self.lam - _shifted(self.lam, 1)

    @staticmethod
    def _blank(latents: torch.Tensor) -> torch.Tensor:
        return latents.new_zeros(1, 1, latents.shape[2], 1, 1)

    def settings(self) -> dict[str, Any]:
        """See FrameSolver.settings."""
        return {**super().settings(), "order": self.order}


class DPMSolver2M(_Multistep):
    """DPM-Solver++ 2M, midpoint or heun form. first_order: levels (grid rows) where the stock scheduler falls back to order
    1."""

    def __init__(self, grid: NoiseGrid, order: int, solver_type: str, first_order: torch.Tensor) -> None:
        super().__init__(grid, order)
        self.solver_type, self.first_order = solver_type, first_order
        ratio = torch.expm1(-self.h)
        self.keep = _shifted(grid.sigma, -1) / grid.sigma
        self.gain = -_shifted(grid.alpha, -1) * ratio
        heun = _shifted(grid.alpha, -1) * (ratio / self.h + 1)
        # the second-order term multiplies (m0 - m1) / r0 with r0 = back / h
        slope = 0.5 * self.gain if solver_type == "midpoint" else heun
        self.bend = torch.where(first_order, 0.0, (slope * self.h / self.back).nan_to_num(0, 0, 0))

    @classmethod
    def from_scheduler(cls, copy: Any) -> "DPMSolver2M":
        """From a DPMSolverMultistepScheduler whose timesteps are set."""
        config = copy.config
        _check(copy, (1, 2))
        if config.algorithm_type != "dpmsolver++" or config.solver_type not in ("midpoint", "heun"):
            raise GenAttnError(
                "a queue takes algorithm_type='dpmsolver++' with solver_type 'midpoint' or 'heun', got "
                f"{config.algorithm_type!r} and {config.solver_type!r}; set them in the scheduler's config"
            )
        grid = grid_from_sigmas(copy)
        first = torch.full((len(grid.timesteps),), config.solver_order == 1)
        few = config.lower_order_final and grid.num_levels < 15
        first[1] |= bool(config.euler_at_final or few or config.final_sigmas_type == "zero")
        return cls(grid, config.solver_order, config.solver_type, first)

    def empty_state(self, latents: torch.Tensor) -> State:
        """The last clean prediction, and whether there is one."""
        return {"last": torch.zeros_like(latents), "known": self._blank(latents)}

    def step(
        self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor, state: State, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """See FrameSolver.step."""
        at = self.grid.at
        clean = self.grid.clean(sample, prediction, levels)
        bend = at(self.bend, levels, sample) * state["known"]
        out = at(self.keep, levels, sample) * sample + at(self.gain, levels, sample) * clean + bend * (clean - state["last"])
        return out.to(sample.dtype), {"last": clean.to(sample.dtype), "known": torch.ones_like(state["known"])}

    def settings(self) -> dict[str, Any]:
        """See FrameSolver.settings."""
        return {**super().settings(), "solver_type": self.solver_type, "first_order": self.first_order.tolist()}


class UniPC(_Multistep):
    """UniPC of order 1 or 2, predicting the clean latent. correct, first_order: per grid row, as the stock scheduler decides.

    A step first corrects the arrival at this level with the new answer (UniC), then predicts the next (UniP).
    """

    def __init__(self, grid: NoiseGrid, order: int, solver_type: str, correct: torch.Tensor, first_order: torch.Tensor) -> None:
        super().__init__(grid, order)
        self.solver_type, self.correct, self.first_order = solver_type, correct, first_order
        self.keep, self.gain, self.base = self._tables(self.h)
        # the same three for the arrival at this level, from the level before
        self.arrive_keep, self.arrive_gain, self.arrive_base = (_shifted(t, 1) for t in (self.keep, self.gain, self.base))
        self.ratio = (-self.back / self.h).nan_to_num(-1, -1, -1)
        self.corrector = self._corrector_weights()

    def _tables(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        alpha, sigma = _shifted(self.grid.alpha, -1), _shifted(self.grid.sigma, -1)
        base = torch.expm1(-h) if self.solver_type == "bh2" else -h
        return sigma / self.grid.sigma, -alpha * torch.expm1(-h), -alpha * base

    def _corrector_weights(self) -> torch.Tensor:
        # rho of the order-2 corrector for the step that starts at each row: solve [[1, 1], [r, 1]] rho = b, row by row
        hh = -self.h
        phi = torch.expm1(hh) / hh - 1
        scale = torch.expm1(hh) if self.solver_type == "bh2" else hh
        b = torch.stack([phi / scale, 2 * (phi / hh - 0.5) / scale], -1)
        matrix = torch.stack([torch.ones(len(hh), 2, dtype=hh.dtype), torch.stack([self.ratio, torch.ones_like(hh)], -1)], -2)
        usable = torch.isfinite(b).all(-1) & ((self.ratio - 1).abs() > 1e-12)
        eye = torch.eye(2, dtype=hh.dtype).expand_as(matrix)
        solved = torch.linalg.solve(torch.where(usable[:, None, None], matrix, eye), torch.where(usable[:, None], b, 0.0))
        return solved

    @classmethod
    def from_scheduler(cls, copy: Any) -> "UniPC":
        """From a UniPCMultistepScheduler whose timesteps are set."""
        config = copy.config
        _check(copy, (1, 2))
        if not config.predict_x0 or copy.solver_p is not None:
            raise GenAttnError(f"a queue takes UniPC with predict_x0=True and no solver_p, got predict_x0={config.predict_x0}")
        grid = grid_from_sigmas(copy)
        if not config.lower_order_final and float(grid.sigma[0]) == 0 and config.solver_order == 2:
            raise GenAttnError("UniPC of order 2 onto sigma 0 is not finite; got lower_order_final=False, set it True")
        if config.solver_type == "bh1" and float(grid.sigma[0]) == 0:
            raise GenAttnError(
                "UniPC with solver_type='bh1' is not finite onto sigma 0; use 'bh2' or final_sigmas_type='sigma_min'"
            )
        rows = torch.arange(len(grid.timesteps))
        # stock counts steps from the noisy end: row r is step num_levels - r; the first step has nothing to correct
        correct = torch.tensor([(grid.num_levels - int(r) - 1) not in config.disable_corrector for r in rows])
        first = torch.full((len(rows),), config.solver_order == 1)
        first[1] |= bool(config.lower_order_final)
        return cls(grid, config.solver_order, config.solver_type, correct, first)

    def empty_state(self, latents: torch.Tensor) -> State:
        """The last two clean predictions, the corrected sample before this one, the order of the last step, steps so far."""
        blank = torch.zeros_like(latents)
        state = {"last": blank, "before": blank.clone(), "sample": blank.clone()}
        return {**state, "order": self._blank(latents), "steps": self._blank(latents)}

    def _corrected(self, sample: torch.Tensor, clean: torch.Tensor, levels: torch.Tensor, state: State) -> torch.Tensor:
        at, last = self.grid.at, state["last"]
        second = state["order"] > 1.5
        rho = _shifted(self.corrector, 1)
        slope = (state["before"] - last) / at(_shifted(self.ratio, 1), levels, sample)
        new = torch.where(second, at(rho[:, 1], levels, sample), 0.5) * (clean - last)
        old = torch.where(second, at(rho[:, 0], levels, sample) * slope, 0.0)
        arrived = at(self.arrive_keep, levels, sample) * state["sample"] + at(self.arrive_gain, levels, sample) * last
        arrived = arrived + at(self.arrive_base, levels, sample) * (old + new)
        use = (state["steps"] > 0.5) & (at(self.correct.double(), levels, sample) > 0.5)
        return torch.where(use, arrived, sample)

    def step(
        self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor, state: State, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """See FrameSolver.step."""
        at = self.grid.at
        clean = self.grid.clean(sample, prediction, levels)
        sample = self._corrected(sample, clean, levels, state)
        first = (at(self.first_order.double(), levels, sample) > 0.5) | (state["steps"] < 0.5)
        slope = (state["last"] - clean) / at(self.ratio, levels, sample)
        bend = torch.where(first, 0.0, 0.5 * at(self.base, levels, sample) * slope)
        out = at(self.keep, levels, sample) * sample + at(self.gain, levels, sample) * clean + bend
        order = torch.where(first, 1.0, 2.0).to(state["order"]).expand_as(state["order"])
        kept = {
            "last": clean,
            "before": state["last"],
            "sample": sample,
            "order": order,
            "steps": (state["steps"] + 1).clamp(max=2),
        }
        return out.to(sample.dtype), {name: tensor.to(state[name].dtype) for name, tensor in kept.items()}

    def settings(self) -> dict[str, Any]:
        """See FrameSolver.settings."""
        return {**super().settings(), "solver_type": self.solver_type, "correct": self.correct.tolist()}
