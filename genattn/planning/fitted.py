"""Neighborhood attention whose window is made for each layout: whole tiles, near a share of the scores.

A published window belongs to one size; on another it is refused or means something else. This pattern asks the planner for the
window of whole tiles nearest to `density` on the layout it meets, so that it serves every model and size.
"""

from dataclasses import dataclass
from functools import lru_cache

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.patterns.as_json import TYPES
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.planning.planner import neighborhood_settings


@dataclass(frozen=True)
class FittedNeighborhood(Pattern):
    """density: wanted share of the scores in (0, 1]. known: windows published for one layout each, taken where it is met."""

    density: float = 0.4
    known: tuple[tuple[tuple[int, int, int], NeighborhoodPattern], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise GenAttnError(f"density must be a share of the scores in (0, 1], got {self.density}; 0.4 is a usual start")
        super().__post_init__()

    def at(self, layout: TokenLayout) -> NeighborhoodPattern:
        """The window for one layout. Raises GenAttnError for one without a grid."""
        if layout.grid is None:
            raise GenAttnError(f"a window needs a grid, got the layout {layout.describe()!r}")
        found = dict(self.known).get(layout.grid3)
        return found or _fitted(layout, self.density)

    def check(self, layout: TokenLayout) -> None:
        """The window must serve the layout."""
        self.at(layout).check(layout)

    def rule(self, layout: TokenLayout) -> ElementRule:
        """The window's rule."""
        return self.at(layout).rule(layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The window's plan."""
        return self.at(layout).build_plan(layout, block_q, block_k)


TYPES[FittedNeighborhood.__name__] = FittedNeighborhood  # patterns know nothing of the planner


@lru_cache(maxsize=64)
def _fitted(layout: TokenLayout, density: float) -> NeighborhoodPattern:
    block = max(16, min(128, 1 << max(1, layout.seqlen // 32).bit_length() - 1))
    options = neighborhood_settings(layout, density, block)
    if not options:
        return NeighborhoodPattern((-1,) * len(layout.grid or (1,)))
    return min(options, key=lambda option: abs(option[1].density - density))[0]
