"""A pattern whose logits to frames beyond the trained window are decayed (after UltraViCo, arXiv 2511.20123).

    LogitDecayed(RadialPattern(), trained_frames=21, decay=0.9)

The inner pattern says what is visited; in what it visits, and in what stands in for the rest, a logit to a key outside the
trained window of frames around the query is multiplied by `decay` and lowered by `penalty`. The plugin `LogitDecay`
(pipelines/long_clip) beside a pattern is the same.
"""

import logging
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from genattn.geometry.frame_decay import FrameDecay, Plan, decayed
from genattn.geometry.plan_build import plan_from_rule
from genattn.geometry.tiles import even_cells, query_key_tiles
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import AroundPattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import SiteMemory

_LOG = logging.getLogger("genattn")
_SAID: set[str] = set()


@dataclass(frozen=True)
class LogitDecayed(AroundPattern):
    """`pattern`, of any kind, with logits decayed outside the window; see `FrameDecay` for the settings.

    `mask` and `rule` are the inner pattern's: they say what is seen, not how much. A clip no longer than trained is untouched,
    which the log tells once.
    """

    trained_frames: int
    decay: float = 0.9
    penalty: float = 0.0
    geometry_alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in asdict(self.frame_decay).items():  # checked, and plain numbers
            object.__setattr__(self, name, value)
        super().__post_init__()

    @cached_property
    def frame_decay(self) -> FrameDecay:
        """The settings of the decay."""
        return FrameDecay(self.trained_frames, self.decay, self.penalty)

    @property
    def lowers_logits(self) -> bool:
        """See Pattern."""
        return True

    @property
    def needs_tensors(self) -> bool:
        """Whether the inner pattern does."""
        return self.pattern.needs_tensors

    def check(self, layout: TokenLayout) -> None:
        """The inner pattern must serve the layout."""
        self.pattern.check(layout)

    def rule(self, layout: TokenLayout) -> ElementRule:
        """The inner pattern's."""
        return self.pattern.rule(layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The inner pattern's; a dense one and windows have tiles that keep to frames, so that the decay is exact."""
        if isinstance(self.pattern, DensePattern) and layout.grid is not None:
            raster_q = _frame_runs(layout, block_q)
            raster_k = raster_q if block_q == block_k else _frame_runs(layout, block_k)
            return plan_from_rule(self.rule(layout), *query_key_tiles(layout, raster_q, raster_k), layout.seqlen)
        inner = self.pattern
        if isinstance(inner, NeighborhoodPattern) and inner.tile == "auto" and self.frame_decay.acts_on(layout):
            inner = replace(inner, tile="frames")
        return inner.with_tail(None).plan(layout, block_q, block_k)

    def plan_for(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block_q: int = 128,
        block_k: int = 128,
        memory: SiteMemory | None = None,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> BlockPlan | HeadTiles:
        """See Pattern.plan_for: what the inner pattern chooses from plain scores, decayed."""
        if not self.needs_tensors:
            return self.plan(layout, block_q, block_k)
        inner = self.pattern if self.tail == "auto" else self.pattern.with_tail(self.tail)
        plan = inner.plan_for(query, key, layout, block_q, block_k, memory=memory, scale=scale, key_mask=key_mask)
        return self._decayed(plan, layout)

    def _stood_in(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        return self._decayed(super()._stood_in(layout, block_q, block_k), layout)

    def _decayed(self, plan: Plan, layout: TokenLayout) -> Plan:
        """The plan decayed; where that changes nothing, the log says why, once."""
        found = decayed(plan, layout, self.frame_decay)
        if found is plan and layout.grid is not None:
            frames, trained = layout.grid3[0], self.trained_frames
            short = f"a clip of {frames} latent frames is no longer than trained ({trained})"
            deep = (
                "every tile reaches into the trained window of every other; give the pattern tiles of one frame (tile='frames')"
            )
            reason = deep if self.frame_decay.acts_on(layout) else short
            if reason not in _SAID:
                _SAID.add(reason)
                _LOG.warning("LogitDecayed has no effect: %s", reason)
        return found


def _frame_runs(layout: TokenLayout, block: int) -> np.ndarray:
    """Int64 [n, block]: each frame in raster order cut into near-equal runs."""
    frames, height, width = layout.grid3
    places = height * width
    return even_cells((frames, 1, places), (frames, 1, -(-places // block)), block)
