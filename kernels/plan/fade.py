"""Logits of tile pairs that stand far apart, lowered: what a plan says of it, next to its lists.

    query tile 5    window  3 .. 9          outside the window       logit <- factor * logit - penalty
    key tile 8      span   10 .. 10         anywhere else            logit as it is

Places are frames of a clip, or any other numbers. A pair of tiles is outside when the whole span of the key tile is outside the
whole window of the query tile, so a tile that straddles two frames is inside as soon as a part of it is. That is one number per
pair for a kernel, and two numbers per tile in memory. The arithmetic is defined in `kernels/reference/attention.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from genattn.kernels.plan.element_rule import GLOBAL, PADDING
from genattn.kernels.plan.kept_entries import keep_entries
from genattn.kernels.plan.tail import packed_bits

if TYPE_CHECKING:
    from genattn.kernels.plan.block_plan import BlockPlan

LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1
# a factor of 0 would make NaN of a hidden score, which is -inf; this one makes 0 of any other
_LEAST_FACTOR = 1e-30


@dataclass(frozen=True, eq=False)
class Fade:
    """Which tile pairs are outside, and what becomes of their logits.

    window: int32 [NQ, 2], first and last place that is inside for the queries of a tile. span: int32 [NK, 2], first and last
        place of the keys of a tile. LOWEST .. HIGHEST in either: the tile is inside with all others (text).
    factor: [0, 1]. penalty: finite, >= 0, in nats.
    """

    window: torch.Tensor
    span: torch.Tensor
    factor: float
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1 or not 0 <= self.penalty < math.inf:
            raise ValueError(
                f"a fade must have a factor in [0, 1] and a finite penalty >= 0, got {self.factor} and {self.penalty}"
            )

    @property
    def kernel_factor(self) -> float:
        """The factor for a kernel that multiplies after hiding; above 0."""
        return max(self.factor, _LEAST_FACTOR)

    def to(self, device: torch.device | str) -> "Fade":
        """The same with its tables on `device`."""
        return replace(self, window=self.window.to(device), span=self.span.to(device))

    def outside(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool: whether a pair of a query tile and a key tile is outside, for int64 indices that broadcast."""
        window, span = self.window[queries], self.span[keys]
        return (span[..., 1] < window[..., 0]) | (span[..., 0] > window[..., 1])

    def table(self) -> torch.Tensor:
        """Bool [NQ, NK]: all pairs, for short sequences."""
        rows, columns = (torch.arange(len(ends), device=self.span.device) for ends in (self.window, self.span))
        return self.outside(rows[:, None], columns[None])

    def acts(self) -> bool:
        """Whether any pair at all is outside."""
        (low, high), (first, last) = self.window.unbind(1), self.span.unbind(1)
        return bool((last.amin() < low.amax()) | (first.amax() > high.amin()))


def fade_of_tokens(
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    place: torch.Tensor,
    windows: torch.Tensor,
    factor: float,
    penalty: float = 0.0,
) -> Fade:
    """The fade of tiles, int32 [NT, B] with -1 in unused lanes, over tokens that stand at places.

    place: int64 [S], the place of each token, 0 <= place < P; GLOBAL (-1) for a token that is inside with all, PADDING (-2) for
    one that nobody sees. windows: int [P, 2], first and last place inside for a query at each place. A query tile has the
    windows of all its tokens together.
    """
    low, high = windows.to(torch.int32).unbind(1)
    spans = torch.arange(len(windows), dtype=torch.int32, device=place.device)
    return Fade(_ends(query_tiles, place, low, high), _ends(key_tiles, place, spans, spans), factor, penalty)


def _ends(tiles: torch.Tensor, place: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Int32 [NT, 2]: the lowest low and the highest high among the tokens of each tile."""
    at = torch.where(tiles >= 0, place[tiles.clamp_min(0).long()], PADDING)
    everywhere = (at == GLOBAL).any(1) | (at == PADDING).all(1)
    first = torch.where(at >= 0, low[at.clamp_min(0)], HIGHEST).amin(1)
    last = torch.where(at >= 0, high[at.clamp_min(0)], LOWEST).amax(1)
    ends = torch.stack([first.masked_fill(everywhere, LOWEST), last.masked_fill(everywhere, HIGHEST)], 1)
    return ends.to(torch.int32).contiguous()


def without_outside(plan: "BlockPlan", fade: Fade) -> "BlockPlan":
    """The plan without the pairs that are outside, neither listed nor stood in for: what an infinite penalty leaves."""
    row, _ = plan.entries
    tiles = plan.query_tiles.shape[0]
    kept = keep_entries(plan, ~fade.outside(row % tiles, plan.columns.long()))
    if plan.tail is None:
        return kept
    inside = packed_bits(~fade.table())
    return replace(kept, tail=replace(plan.tail, skipped=plan.tail.skipped & inside))
