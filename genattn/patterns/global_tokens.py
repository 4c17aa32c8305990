"""A few grid tokens that see everything and are seen by everything, on top of another pattern.

    GlobalTokens(pattern, frames=(0, -1))          whole frames: anchors for a long clip
    GlobalTokens(pattern, every=(1, 8, 8))         a coarse lattice: one token in 64 carries news across the picture

The chosen tokens get tiles of their own, so that they do not make the tiles they stood in dense.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.plan_build import plan_from_rule
from genattn.geometry.tiles import run_raster
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import BlockRule, CombinedRule, ElementRule, GridRule, PerHeadRule
from genattn.patterns.pattern import Pattern, TailName
from genattn.settings import whole_numbers


@dataclass(frozen=True)
class AroundPattern(Pattern):
    """Base of the patterns that add to one other pattern, of geometry alone. tail: "auto" takes the inner pattern's."""

    pattern: Pattern
    geometry_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern) or (self.geometry_alone and self.pattern.needs_tensors):
            raise GenAttnError(
                f"{type(self).__name__} needs a pattern of geometry alone inside, such as RadialPattern(), "
                f"got {self.pattern!r}; Union(...) takes those that choose by content"
            )
        if self.pattern.lowers_logits:
            inner = type(self.pattern).__name__
            raise GenAttnError(
                f"{type(self).__name__} cannot hold {inner}, whose logits it would leave; put {inner} around all"
            )
        super().__post_init__()

    @property
    def hides_on_purpose(self) -> bool:
        """Whether the inner pattern does."""
        return self.pattern.hides_on_purpose

    @property
    def measured_tail(self) -> TailName:
        """The inner pattern's own, or the one that measured best for it."""
        return self.pattern.measured_tail if self.pattern.tail == "auto" else self.pattern.tail

    def with_measured_tail(self) -> "AroundPattern":
        """With the inner pattern's measured tail, where nothing else is asked for."""
        return self if self.tail != "auto" else replace(self, pattern=self.pattern.with_measured_tail())

    def tail_of_heads(self) -> TailName | tuple[TailName, ...]:
        """The inner pattern's where nothing else is asked for."""
        return self.pattern.tail_of_heads() if self.tail == "auto" else self.tail

    def for_layer(self, layer: int, num_layers: int) -> "AroundPattern":
        """With the inner pattern of one layer."""
        return replace(self, pattern=self.pattern.for_layer(layer, num_layers))

    def for_step(self, step: int = -1, fraction: float | None = None) -> "AroundPattern":
        """With the inner pattern of one step."""
        return replace(self, pattern=self.pattern.for_step(step, fraction))

    def for_heads(self, first: int, count: int) -> "AroundPattern":
        """With the inner pattern of some heads."""
        return replace(self, pattern=self.pattern.for_heads(first, count))

    def check_model(self, name: str, heads: tuple[int, ...], layers: int) -> None:
        """The inner pattern must be for this model."""
        self.pattern.check_model(name, heads, layers)


@dataclass(frozen=True)
class GlobalTokens(AroundPattern):
    """`pattern` plus global tokens. frames: indices, negative from the end. every: a step per (frames, height, width)."""

    frames: tuple[int, ...] = ()
    every: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", whole_numbers("frames", self.frames, None, "indices of frames; e.g. (0, -1)"))
        if self.every is not None:
            steps = whole_numbers("every", self.every, 1, "a step >= 1 for frames, height and width; e.g. (1, 8, 8)")
            object.__setattr__(self, "every", steps)
            if len(steps) != 3:
                raise GenAttnError(f"every must give a step >= 1 for frames, height and width, got {self.every}")
        if not self.frames and self.every is None:
            raise GenAttnError("GlobalTokens needs frames or every, got neither; e.g. frames=(0,) or every=(1, 8, 8)")
        super().__post_init__()

    def check(self, layout: TokenLayout) -> None:
        """The frames must exist."""
        self.pattern.check(layout)
        count = layout.grid3[0]
        wrong = [f for f in self.frames if not -count <= f < count]
        if wrong and layout.grid is not None:
            raise GenAttnError(f"frames must lie between {-count} and {count - 1}, got {wrong}")

    def tokens(self, layout: TokenLayout) -> torch.Tensor:
        """Int64, ascending: places in the sequence of the grid tokens that are made global."""
        if layout.grid is None:
            return torch.empty(0, dtype=torch.int64)
        chosen = np.zeros(layout.grid3, dtype=bool)
        chosen[list(self.frames)] = True
        if self.every is not None:
            chosen[tuple(slice(None, None, step) for step in self.every)] = True
        return layout.grid_positions[torch.from_numpy(chosen.reshape(-1))].sort().values

    def rule(self, layout: TokenLayout) -> ElementRule:
        """The inner rule with the chosen tokens marked global."""
        return _with_globals(self.pattern.rule(layout), self.tokens(layout), layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The inner pattern's tiles without the chosen tokens, and tiles for those."""
        inner, tokens = self.pattern.with_tail(None).plan(layout, block_q, block_k), self.tokens(layout)
        query, key = (_set_apart(tiles, tokens) for tiles in (inner.query_tiles, inner.key_tiles))
        return plan_from_rule(self.rule(layout), query, key, layout.seqlen)


def _set_apart(tiles: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    block = tiles.shape[1]
    rest = torch.where(torch.isin(tiles, tokens.to(torch.int32)), -1, tiles)
    rest = rest.gather(1, (rest < 0).to(torch.uint8).argsort(dim=1, stable=True))
    runs = torch.from_numpy(run_raster(tokens.numel(), block))
    own = torch.where(runs >= 0, tokens[runs.clamp_min(0)] if tokens.numel() else runs, -1).to(torch.int32)
    return torch.cat([own, rest[(rest >= 0).any(1)]])


def _with_globals(rule: ElementRule, tokens: torch.Tensor, layout: TokenLayout) -> ElementRule:
    if isinstance(rule, GridRule):
        coords = rule.coords.clone()
        coords[tokens] = torch.tensor([-1, 0, 0], dtype=coords.dtype)
        return replace(rule, coords=coords)
    if isinstance(rule, BlockRule):
        place = layout.raster_index.to(torch.int32) if rule.place is None else rule.place.clone()
        place[tokens] = -1
        return replace(rule, place=place)
    if isinstance(rule, CombinedRule | PerHeadRule):
        return replace(rule, rules=tuple(_with_globals(r, tokens, layout) for r in rule.rules))
    raise GenAttnError(f"GlobalTokens does not serve {type(rule).__name__}")
