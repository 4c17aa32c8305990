"""Anchor frames that everything sees, others in every step (after LVSA, arXiv 2605.31057).

    step 0   A . . . A . . . A . . .        A: a frame that sees all frames and is seen by all
    step 1   . A . . . A . . . A . .        .: a frame under the inner pattern, e.g. a window of the trained length
    step 2   . . A . . . A . . . A .

A window of frames keeps a long clip in the model's trained range but lets its ends drift apart. A few anchors tie them
together, and since they move on by one frame per step, every frame has been one after `stride` steps.
"""

from dataclasses import dataclass, replace

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.patterns.global_tokens import AroundPattern, GlobalTokens
from genattn.patterns.pattern import Pattern
from genattn.settings import whole_number


@dataclass(frozen=True)
class RotatingAnchors(AroundPattern):
    """`pattern` plus every `stride`-th frame as an anchor, >= 1. offset: the first anchor; `for_step` moves it on."""

    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("offset", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, f"a number of frames >= {least}"))
        if self.offset >= self.stride:
            raise GenAttnError(f"offset must be 0 to stride - 1 = {self.stride - 1}, got {self.offset}")
        super().__post_init__()

    def for_step(self, step: int = -1, fraction: float | None = None) -> "RotatingAnchors":
        """With the anchors of one sampling step, the inner pattern's too; an unknown step (-1) leaves them."""
        moved = self.offset if step < 0 else (self.offset + step) % self.stride
        return replace(self, pattern=self.pattern.for_step(step, fraction), offset=moved)

    def fixed(self, layout: TokenLayout) -> GlobalTokens | Pattern:
        """The same as a pattern of global frames; the inner pattern alone where a clip has fewer frames than the offset."""
        frames = tuple(range(self.offset, layout.grid3[0], self.stride))
        return GlobalTokens(self.pattern, frames) if frames else self.pattern

    def check(self, layout: TokenLayout) -> None:
        """See Pattern.check."""
        self.fixed(layout).check(layout)

    def rule(self, layout: TokenLayout) -> ElementRule:
        """See Pattern.rule."""
        return self.fixed(layout).rule(layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """See Pattern.build_plan."""
        return self.fixed(layout).build_plan(layout, block_q, block_k)
