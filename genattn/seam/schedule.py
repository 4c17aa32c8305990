"""When a pattern acts: after the first dense steps, below the first dense layers, inside a noise window, in chosen passes.

The first steps decide layout and motion and the first layer mixes everything, so both stay dense by default (Radial Attention,
arXiv:2506.19852, section 5.1). Steps are fractions of the run or counts; raw timesteps differ between models and are not used.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import Run
from genattn.settings import number, refuse, several, whole_number, whole_numbers


@dataclass(frozen=True)
class Schedule:
    """Frozen settings; every part can only add dense calls.

    dense_steps, dense_last_steps: a float in [0, 1] is a share of the run, an int >= 0 a number of steps.
    dense_layers: number of first blocks (over all stacks, in execution order), or the block numbers themselves.
    dense_last_layers: number of last blocks. sigma: (low, high) noise levels between which sparse may run, ends included.
    passes: names of passes that may run sparse, e.g. ("cond",); None means all. min_tokens: shorter sequences stay dense.
    """

    dense_steps: float | int = 0.25
    dense_last_steps: float | int = 0
    dense_layers: int | tuple[int, ...] = 1
    dense_last_layers: int = 0
    sigma: tuple[float, float] | None = None
    passes: tuple[str, ...] | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            object.__setattr__(self, name, _checked_steps(name, getattr(self, name)))
        object.__setattr__(self, "dense_layers", _checked_layers(self.dense_layers))
        for name, what in (("dense_last_layers", "a number of blocks >= 0"), ("min_tokens", "a number of tokens >= 0")):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0, what))
        if self.sigma is not None:
            object.__setattr__(self, "sigma", _checked_window(self.sigma))
        if self.passes is not None:
            what = 'names of guidance passes such as ("cond",), or None for all'
            names = (self.passes,) if isinstance(self.passes, str) else several("passes", self.passes, what)
            if not names or not all(isinstance(name, str) and name.strip() for name in names):
                raise refuse("passes", self.passes, what)
            object.__setattr__(self, "passes", names)

    @staticmethod
    @lru_cache(maxsize=1)
    def names() -> frozenset[str]:
        """The settings that may also come as per-call options."""
        return frozenset(f.name for f in fields(Schedule))

    def with_options(self, options: Mapping[str, Any]) -> "Schedule":
        """This schedule with those of its settings that `options` names."""
        if not options:
            return self
        changes = {name: value for name, value in options.items() if name in self.names()}
        return replace(self, **changes) if changes else self

    def why_dense(self, run: Run, site: AttentionSite, tokens: int, blocks: int = 0) -> str | None:
        """The reason for which this call must stay dense, or None. tokens: sequence length; blocks: blocks of the model."""
        return self._why_steps(run) or self._why_site(site, tokens, blocks) or self._why_window(run)

    def why_idle(self, run: Run) -> str:
        """Why every step of the run that starts with `run` stays dense; empty where one may run sparse, or all were meant to.

        The dense steps and the noise window; where the number of steps is not known, nothing is said.
        """
        if run.num_steps is None or (self.dense_steps == 1.0 and isinstance(self.dense_steps, float)):
            return ""
        reason: str | None = ""
        anywhere = replace(self, passes=None)
        for step in range(run.num_steps):
            sigma = run.sigmas[step] if run.sigmas else None
            there = replace(run, step=step, sigma=sigma)
            reason = self._why_steps(there) or (None if sigma is None else anywhere._why_window(there))
            if not reason:
                return ""
        return f"{reason}" if reason else ""

    def _why_steps(self, run: Run) -> str | None:
        if not self.dense_steps and not self.dense_last_steps:
            return None
        if run.step < 0:
            return "the sampling step is unknown (the attention ran outside a forward of the denoiser)"
        counted = isinstance(self.dense_steps, int) and not self.dense_last_steps
        if run.num_steps is None and not counted:
            return (
                "the number of steps is unknown; give num_steps=... (a bare model does not tell it) or dense_steps as a count"
            )
        total = run.num_steps or 0
        if run.step < _count(self.dense_steps, total):
            return f"first dense steps (dense_steps={self.dense_steps})"
        if self.dense_last_steps and run.step >= total - _count(self.dense_last_steps, total):
            return f"last dense steps (dense_last_steps={self.dense_last_steps})"
        return None

    def _why_site(self, site: AttentionSite, tokens: int, blocks: int) -> str | None:
        layers = self.dense_layers
        if site.depth in layers if isinstance(layers, tuple) else site.depth < layers:
            return f"dense layer (dense_layers={layers})"
        if self.dense_last_layers and site.depth >= blocks - self.dense_last_layers:
            return f"dense layer (dense_last_layers={self.dense_last_layers})"
        if tokens < self.min_tokens:
            return f"short sequence (min_tokens={self.min_tokens})"
        return None

    def _why_window(self, run: Run) -> str | None:
        if self.sigma is not None:
            if run.sigma is None:
                return (
                    "the noise level is unknown, so the sigma window cannot be kept; apply to the pipeline or use dense_steps"
                )
            if not self.sigma[0] <= run.sigma <= self.sigma[1]:
                return f"outside the noise window (sigma={self.sigma})"
        if self.passes is not None and run.pass_name not in self.passes:
            return f"pass {run.pass_name!r} is not among passes={self.passes}"
        return None


def _count(steps: float | int, total: int) -> int:
    return steps if isinstance(steps, int) else math.ceil(steps * total - 1e-9)


def _checked_steps(name: str, value: object) -> float | int:
    what = "a share of the run in [0.0, 1.0] or a whole number of steps >= 0"
    if isinstance(value, numbers.Integral):
        return whole_number(name, value, 0, what)
    return number(name, value, 0, 1, what)


def _checked_layers(value: object) -> int | tuple[int, ...]:
    what = "a number of blocks >= 0, or a list of block numbers"
    if isinstance(value, numbers.Integral):
        return whole_number("dense_layers", value, 0, what)
    return whole_numbers("dense_layers", value, 0, what)


def _checked_window(sigma: object) -> tuple[float, float]:
    what = "a window (low, high) with low <= high"
    values = [number("sigma", end, -math.inf, math.inf, what) for end in several("sigma", sigma, what)]
    if len(values) != 2 or not values[0] <= values[1]:
        raise refuse("sigma", sigma, what)
    return values[0], values[1]
