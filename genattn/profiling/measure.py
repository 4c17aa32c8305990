"""Which pattern suits which head of a given model, measured: sparse against dense attention on the model's own activations.

    found = measure_patterns(pipe, lambda: pipe("a red circle", num_inference_steps=8), [RadialPattern(decay=0.2), ...])
    pattern = found.choose(target_density=0.4)         # or max_error=0.1
    save_pattern(pattern, "settings.json", found.notes())

While the pipeline runs dense, every self-attention of a few steps is answered once more under each candidate and only the error
of its output is kept, per layer and head: |o_sparse - o_dense|^2 / |o_dense|^2. Errors of different heads enter the residual
stream side by side, so the sum of squares is what `choose` keeps small for the density that is left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.combine import PerHead, PerLayer
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import Pattern
from genattn.seam.handle import apply
from genattn.seam.plugin import AttentionCall, CallRecord, Inner, Plugin, Run
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin
from genattn.selection.budget import Budget, spread_shares

_DOUBLINGS = 200  # of the price of density: beyond any ratio of two errors that a float holds apart


@dataclass(frozen=True, eq=False)
class Measurement:
    """Errors of the candidates. errors: float64 [layers, heads, candidates], relative and squared; densities: [candidates].

    The first candidate is dense, with error 0. calls: attention calls that were looked at.
    """

    candidates: tuple[Pattern, ...]
    errors: torch.Tensor
    densities: torch.Tensor
    calls: int

    def choose(self, target_density: float | None = None, max_error: float | None = None) -> Pattern:
        """One candidate per head: least error for a mean density of at most `target_density`, or sparsest below `max_error`.

        max_error: relative error of a head's output, e.g. 0.1. Raises GenAttnError unless exactly one is given, in range, and
        for measurements that are not finite.
        """
        if not bool(torch.isfinite(self.errors).all() & torch.isfinite(self.densities).all()):
            raise GenAttnError("errors and densities must be finite, got NaN or Inf; measure again on a run without them")
        if (target_density is None) == (max_error is None):
            raise GenAttnError(f"give target_density or max_error, got {target_density} and {max_error}")
        if max_error is not None:
            if not max_error >= 0:
                raise GenAttnError(f"max_error must be >= 0, got {max_error}")
            cost = torch.where(self.errors.sqrt() <= max_error, self.densities, math.inf)
            return self._pattern(cost.argmin(-1))
        assert target_density is not None
        least = float(self.densities.min())
        if not least <= target_density <= 1:
            raise GenAttnError(
                f"target_density must be between {least:.3f} (the sparsest candidate) and 1, got {target_density}"
            )
        low, high = 0.0, 1.0
        for _ in range(_DOUBLINGS):
            if self._density(high) <= target_density:
                break
            high *= 2
        else:  # the sparsest candidate everywhere, which the smallest target allows
            return self._pattern(self.densities.argmin().expand(self.errors.shape[:-1]))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._density(middle) > target_density else (low, middle)
        return self._pattern(self._at(high))

    def _at(self, price: float) -> torch.Tensor:
        """Candidate per head when density costs `price`; between equals the sparser one."""
        return (self.errors.double() + (price + 1e-12) * self.densities.double()).argmin(-1)

    def _density(self, price: float) -> float:
        return float(self.densities.double()[self._at(price)].mean())

    def _pattern(self, choice: torch.Tensor) -> Pattern:
        layers = [self._layer(row.tolist()) for row in choice]
        distinct = tuple(dict.fromkeys(layers))
        return PerLayer(distinct, tuple(distinct.index(layer) for layer in layers))

    def _layer(self, choice: list[int]) -> Pattern:
        if len(set(choice)) == 1:
            return self.candidates[choice[0]]
        used = sorted(set(choice))
        return PerHead(tuple(self.candidates[c] for c in used), tuple(used.index(c) for c in choice))

    def notes(self) -> dict[str, Any]:
        """Errors and densities for the settings file."""
        return {
            "candidates": [repr(c) for c in self.candidates],
            "densities": [round(float(d), 4) for d in self.densities],
            "relative_error": [[[round(float(e), 4) for e in head] for head in layer] for layer in self.errors.sqrt()],
            "calls": self.calls,
        }


def with_and_without_tail(candidates: Sequence[Pattern]) -> list[Pattern]:
    """Each pattern that leaves its tail open ("auto") twice: without one, and with the one that measured best for it.

    So `choose` switches the tail on or off by layer and head.
    """
    pairs = ((p,) if p.tail != "auto" else (p.with_tail(None), p.with_measured_tail()) for p in candidates)
    return list(dict.fromkeys(pattern for pair in pairs for pattern in pair))


def measure_patterns(
    target: Any,
    run: Callable[[], Any],
    candidates: Sequence[Pattern],
    fractions: Sequence[float] = (0.25, 0.5, 0.75),
    impl: str = "auto",
) -> Measurement:
    """Run the pipeline or model `target` once with `run()` and measure `candidates` against dense attention.

    fractions: places in the run, in [0, 1), whose step is looked at; all steps where the number of steps is unknown.
    Raises GenAttnError without candidates, or, with the reason, if one of them could not serve an attention call.
    """
    found = tuple(dict.fromkeys(c for c in candidates if not isinstance(c, DensePattern)))
    if not found:
        raise GenAttnError("measure_patterns needs at least one pattern besides dense, got none")
    if not fractions or not all(0 <= f < 1 for f in fractions):
        raise GenAttnError(f"fractions must lie in [0, 1), got {tuple(fractions)}")
    probe = _Probe(found, tuple(fractions), impl)
    with apply(target, probe):
        run()
    return probe.result()


class _Probe(Plugin):
    """Looks at attention calls and lets them pass."""

    def __init__(self, candidates: tuple[Pattern, ...], fractions: tuple[float, ...], impl: str) -> None:
        self.candidates, self.fractions = candidates, fractions
        always = Schedule(dense_steps=0, dense_layers=0)
        self.tries = [SparsePlugin(pattern, always, impl) for pattern in candidates]
        self.error: dict[int, torch.Tensor] = {}
        self.power: dict[int, torch.Tensor] = {}
        self.density = torch.zeros(len(candidates), dtype=torch.float64)
        self.calls, self.reasons = 0, ["no self-attention was called"] * len(candidates)

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        for one in self.tries:
            one.attach(model, sites)

    def detach(self, model: nn.Module) -> None:
        for one in self.tries:
            one.detach(model)

    def wants(self, site: AttentionSite) -> bool:
        return self.tries[0].wants(site) and site.depth >= 0

    @torch.no_grad()
    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        dense = inner(call)
        if self._looks_at(call.run):
            errors, densities = zip(*(self._try(i, call, dense) for i in range(len(self.tries))))
            self._add(call, torch.stack(errors, dim=-1), dense)
            self.density += torch.tensor(densities, dtype=torch.float64)
            self.calls += 1
        return dense

    def _looks_at(self, run: Run) -> bool:
        if run.extra is not None:
            return False
        return run.num_steps is None or run.step in {math.ceil(f * run.num_steps) for f in self.fractions}

    def _try(self, index: int, call: AttentionCall, dense: torch.Tensor) -> tuple[torch.Tensor, float]:
        record = CallRecord()
        out = self.tries[index].attention(call.with_tensors(record=record), lambda _: dense)
        self.reasons[index] = "" if record.sparse else record.reason
        return _squares(out - dense), record.density

    def _add(self, call: AttentionCall, error: torch.Tensor, dense: torch.Tensor) -> None:
        depth = call.site.depth
        heads = range(call.head_offset, call.head_offset + dense.shape[2])
        for sums, value in ((self.error, error), (self.power, _squares(dense))):
            whole = sums.setdefault(depth, torch.zeros(call.site.heads, *value.shape[1:], dtype=torch.float64))
            whole[list(heads)] += value

    def result(self) -> Measurement:
        """The sums as relative errors, dense first."""
        for pattern, reason in zip(self.candidates, self.reasons):
            if reason:
                raise GenAttnError(f"{pattern} could not be measured: {reason}")
        depths = range(max(self.error) + 1)
        shape = next(iter(self.error.values())).shape
        # a layer that was never looked at stays dense
        lost = torch.full(shape, math.inf, dtype=torch.float64)
        relative = [self.error[d] / self.power[d][:, None].clamp_min(1e-30) if d in self.error else lost for d in depths]
        errors = torch.stack([torch.cat([torch.zeros(shape[0], 1, dtype=torch.float64), r], dim=1) for r in relative])
        densities = torch.cat([torch.ones(1, dtype=torch.float64), self.density / self.calls])
        return Measurement((DensePattern(), *self.candidates), errors, densities, self.calls)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Float64 [H]: sum of squares per head of [B, S, H, D]."""
    return x.detach().float().square().sum(dim=(0, 1, 3)).double().cpu()


def sparsest_above(
    target: Any,
    frames: Callable[[], torch.Tensor],
    measurement: Measurement,
    min_psnr: float,
    densities: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    **schedule: Any,
) -> tuple[Pattern, float, float]:
    """The measured settings of lowest density whose video stays within `min_psnr` dB of the dense one.

    frames: runs the pipeline and returns the video as floats in [0, 1]; same seed every time. schedule: as in `genattn.apply`.
    Returns (pattern, its target density, its PSNR); the dense pattern, 1 and infinity when none reaches `min_psnr`.
    """
    dense = frames()
    for density in sorted(d for d in densities if d >= float(measurement.densities.min())):
        pattern = measurement.choose(target_density=density)
        with apply(target, pattern, **schedule):
            error = float((frames() - dense).double().square().mean())
        psnr = math.inf if error == 0 else -10 * math.log10(error)
        if psnr >= min_psnr:
            return pattern, density, psnr
    return DensePattern(), 1.0, math.inf


def measured_budget(measurement: Measurement, target: float) -> Budget:
    """The budget that spreads a share of `target` over layers and heads where it lowers the measured error most.

    measurement: of one `AdaptivePattern` at several shares: `measure_patterns(pipe, run, [AdaptivePattern(TopK(s)), ...])`.
    Hand the result to the same pattern as `budget=`. Raises GenAttnError for other candidates, or a target below the shares.
    """
    patterns = measurement.candidates[1:]
    if not all(isinstance(p, AdaptivePattern) and isinstance(p.chosen_by.amount, float) for p in patterns):
        raise GenAttnError(f"a budget needs AdaptivePatterns of one share each, got {[type(p).__name__ for p in patterns]}")
    amounts = [p.chosen_by.amount for p in patterns]  # type: ignore[attr-defined]
    order = sorted(range(len(amounts)), key=lambda i: amounts[i])
    errors = measurement.errors[..., [i + 1 for i in order]]
    shares = [amounts[i] for i in order]
    if shares[-1] < 1:  # the first candidate is dense
        errors, shares = torch.cat([errors, measurement.errors[..., :1]], dim=-1), [*shares, 1.0]
    # a layer that was never looked at must not draw the share to itself
    errors = torch.where(torch.isfinite(errors), errors, 0.0)
    return Budget(layers=tuple(tuple(row) for row in spread_shares(errors, shares, target).tolist()))
