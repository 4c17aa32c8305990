"""The rules by which tiles are chosen from an estimate, each with one amount: a number, or one per head.

    TopK(share)        the heaviest tiles of each query tile, a share of all
    TopP(mass)         the smallest set whose mass reaches p: flat heads get more, sharp ones less       (SVG2, SpargeAttn)
    Threshold(tau)     tiles whose score is more than tau standard deviations above the row's mean       (Sol-Attn)
    ErrorAware(share)  a share again, ranked by what standing in would lose: mass times spread of the scores (SVG-EAR)

Every rule keeps at least the heaviest tile of each row.
"""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from genattn.errors import GenAttnError
from genattn.selection.estimate import Estimate
from genattn.settings import BELOW_ONE, flag, number, one_of, refuse, several

Amount = float | tuple[float, ...]


@dataclass(frozen=True)
class Rule(ABC):
    """Base of the rules. `amount_name` is the field that a budget sets."""

    amount_name: ClassVar[str]
    needs_spread: ClassVar[bool] = False

    @property
    def amount(self) -> Amount:
        """The rule's one number, or one per head."""
        value: Amount = getattr(self, self.amount_name)
        return value

    def with_amount(self, amount: float | Sequence[float]) -> "Rule":
        """The same rule with another amount."""
        changes: dict[str, Any] = {self.amount_name: amount}
        return replace(self, **changes)

    @abstractmethod
    def choose(self, estimate: Estimate) -> torch.Tensor:
        """Bool [H, NQ, NK]: the chosen tiles."""

    @abstractmethod
    def scaled(self, factor: float) -> "Rule":
        """The rule with `factor` times the work, kept in its range."""


@dataclass(frozen=True)
class TopK(Rule):
    """The `share` in (0, 1] of the key tiles with the largest mass, rounded up."""

    share: float | Sequence[float] = 0.25
    amount_name: ClassVar[str] = "share"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _amount("share", self.share, 0, 1, "a share of the key tiles in (0, 1]"))

    def choose(self, estimate: Estimate) -> torch.Tensor:
        """See Rule."""
        return largest(estimate.mass, self.amount, estimate.open, estimate.counted)

    def scaled(self, factor: float) -> "TopK":
        """See Rule."""
        return replace(self, share=_each(self.share, lambda share: min(1.0, share * factor)))


@dataclass(frozen=True)
class ErrorAware(Rule):
    """The `share` in (0, 1] of the key tiles that lose most when their mean, or their two means, stand in for them.

    A heavy but uniform tile is stood in for perfectly, so it ranks behind a lighter one of very different keys (SVG-EAR, arXiv
    2603.08982). Under the tail "mean2" it is the spread inside the halves of like keys. Meant for patterns with a tail: without
    one, a skipped tile loses all its mass.
    """

    share: float | Sequence[float] = 0.25
    amount_name: ClassVar[str] = "share"
    needs_spread: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _amount("share", self.share, 0, 1, "a share of the key tiles in (0, 1]"))

    def choose(self, estimate: Estimate) -> torch.Tensor:
        """See Rule."""
        return largest(estimate.mass * estimate.spread, self.amount, estimate.open, estimate.counted)

    def scaled(self, factor: float) -> "ErrorAware":
        """See Rule."""
        return replace(self, share=_each(self.share, lambda share: min(1.0, share * factor)))


@dataclass(frozen=True)
class TopP(Rule):
    """The heaviest tiles until their mass reaches `mass` in (0, 1].

    least: share of the key tiles in [0, 1) that is kept in any case, rounded down. reach: whether the tile that crosses the
    mark is kept too (SVG2), or only those below it (SpargeAttn).
    """

    mass: float | Sequence[float] = 0.9
    least: float = 0.0
    reach: bool = True
    amount_name: ClassVar[str] = "mass"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", _amount("mass", self.mass, 0, 1, "a share of the attention mass in (0, 1]"))
        what = "a share of the key tiles in [0, 1); 0 keeps none in any case"
        object.__setattr__(self, "least", number("least", self.least, 0, BELOW_ONE, what))
        flag("reach", self.reach)

    def choose(self, estimate: Estimate) -> torch.Tensor:
        """See Rule."""
        return heaviest(estimate.mass, self.amount, self.least, self.reach) & estimate.open

    def scaled(self, factor: float) -> "TopP":
        """See Rule."""
        return replace(self, mass=_each(self.mass, lambda mass: min(1.0, mass * factor)))


@dataclass(frozen=True)
class Threshold(Rule):
    """Tiles whose score exceeds the row's mean over all open tiles by `tau` standard deviations.

    Sol-Attn (arXiv 2607.24027). variance: "exact", of the scores themselves, or "diag", from the variance of each channel of
    the mean keys, as its release does by default. tau = 1, 1.5, 2 leaves about 16, 7 and 2 % of the tiles of a normal row.
    """

    tau: float | Sequence[float] = 1.3
    variance: Literal["exact", "diag"] = "exact"
    amount_name: ClassVar[str] = "tau"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", _amount("tau", self.tau, -100, 100, "a number of standard deviations in (-100, 100]"))
        one_of("variance", self.variance, ("exact", "diag"))

    def choose(self, estimate: Estimate) -> torch.Tensor:
        """See Rule."""
        weight = estimate.open.to(estimate.score.dtype).expand(estimate.score.shape[1:])
        total = weight.sum(-1, keepdim=True).clamp_min(1)
        mean = (estimate.score.nan_to_num(neginf=0.0) * weight).sum(-1, keepdim=True) / total
        if self.variance == "exact":
            apart = (estimate.score - mean).square().nan_to_num(posinf=0.0)
            variance = (apart * weight).sum(-1, keepdim=True) / total
        else:
            variance = _channel_variance(estimate)
        # the release takes the root of a variance in bits plus 1e-6
        deviation = (variance + 1e-6 * _LN2**2).sqrt()
        tau = torch.as_tensor(self.amount, dtype=mean.dtype, device=mean.device).reshape(-1, 1, 1)
        above = (estimate.score - mean - tau * deviation).mean(0) > 0
        return (above | largest(estimate.mass, 1e-9, estimate.open)) & estimate.open

    def scaled(self, factor: float) -> "Threshold":
        """A lower bar for more work: tau / factor above zero."""
        return replace(self, tau=_each(self.tau, lambda tau: tau / factor if tau > 0 else tau * factor))


_LN2 = 0.6931471805599453
RULES: dict[str, type[Rule]] = {"top-k": TopK, "top-p": TopP, "threshold": Threshold, "error-aware": ErrorAware}


def rule_named(name: str) -> Rule:
    """The rule called `name` with its default amount. Raises GenAttnError that lists the names."""
    if name not in RULES:
        raise GenAttnError(f"rule must be one of {', '.join(RULES)} or a rule object, got {name!r}")
    return RULES[name]()


def largest(values: torch.Tensor, share: Amount, open: torch.Tensor, counted: int | None = None) -> torch.Tensor:
    """Bool [H, NQ, NK]: per row the ceil(share x counted) largest open entries, at least one; counted: NK unless given.

    share: a number or one per head.
    """
    heads, _, tiles = values.shape
    shares = torch.as_tensor(share, dtype=torch.float64).reshape(-1)
    _check_heads(shares.numel(), heads)
    counts = (shares * (counted or tiles)).ceil().clamp(1, tiles).long().to(values.device)
    most = int(counts.max())
    found = values.masked_fill(~open, -1.0).topk(most, dim=-1).indices
    wanted = torch.arange(most, device=values.device) < counts[:, None, None]
    hit = torch.zeros_like(values, dtype=torch.bool)
    return hit.scatter_(-1, found, wanted.expand(found.shape)) & open


def heaviest(mass: torch.Tensor, p: Amount, least: float = 0.0, reach: bool = True) -> torch.Tensor:
    """Bool like mass [H, NQ, NK]: the largest entries of each row until their sum reaches p, at least one.

    least: share of the row kept in any case. reach: whether the entry that crosses p is kept.
    """
    values, order = mass.sort(dim=-1, descending=True)
    marks = torch.as_tensor(p, dtype=values.dtype, device=values.device).reshape(-1, 1, 1)
    _check_heads(marks.shape[0], mass.shape[0])
    total = values.cumsum(-1)
    kept = total <= marks
    if reach:
        kept = torch.cat([torch.ones_like(kept[..., :1]), kept[..., :-1]], dim=-1)
    kept[..., : max(1, int(least * mass.shape[-1]))] = True
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, kept)


def _channel_variance(estimate: Estimate) -> torch.Tensor:
    """[B, H, NQ, 1]: variance of the scores over the open tiles, were the channels of the mean keys independent."""
    weight = estimate.open.to(estimate.key.dtype).amax(1, keepdim=True).transpose(-1, -2)  # open to any query tile
    total = weight.sum(-2, keepdim=True).clamp_min(1)
    mean = (estimate.key * weight).sum(-2, keepdim=True) / total
    variance = ((estimate.key - mean).square() * weight).sum(-2, keepdim=True) / total
    return (estimate.query.square() * variance).sum(-1, keepdim=True)


def _check_heads(given: int, heads: int) -> None:
    if given not in (1, heads):
        raise GenAttnError(f"a rule needs one amount, or one per head, got {given} amounts for {heads} heads")


def _amount(name: str, value: float | Sequence[float], low: float, high: float, what: str) -> Amount:
    what = f"{what}, or one per head"
    if isinstance(value, numbers.Real):
        return number(name, value, low, high, what, above=True)
    values = several(name, value, what)
    if not values:
        raise refuse(name, value, what)
    return tuple(number(name, entry, low, high, what, above=True) for entry in values)


def _each(amount: float | Sequence[float], change: Any) -> Amount:
    return change(amount) if isinstance(amount, int | float) else tuple(change(v) for v in amount)
