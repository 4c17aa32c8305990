"""Every query sees every key that is not padding: the pattern that all others are measured against."""

from dataclasses import dataclass

import torch

from genattn.geometry.plan_build import plan_from_rule
from genattn.geometry.tiles import empty_raster, query_key_tiles, run_raster
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import GLOBAL, PADDING, ElementRule, GridRule
from genattn.patterns.pattern import Pattern


def dense_rule(layout: TokenLayout) -> GridRule:
    """All tokens global: the rule of layouts without a grid, and of dense attention."""
    padding = layout.raster_index == PADDING
    coords = torch.zeros(layout.seqlen, 3, dtype=torch.int32)
    coords[:, 0] = torch.where(padding, PADDING, GLOBAL)
    one = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    return GridRule(coords, torch.zeros(1, 1, 1, dtype=torch.int32), one, one + 1, (1, 1))


@dataclass(frozen=True)
class DensePattern(Pattern):
    """Full attention. Text, grid, references and registers see one another; padding is no key."""

    def rule(self, layout: TokenLayout) -> ElementRule:
        """All visible but padding."""
        return dense_rule(layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """Every query tile visits every key tile."""
        tiles = dense_tiles(layout, block_q, block_k)
        return plan_from_rule(self.rule(layout), *tiles, layout.seqlen)


def dense_tiles(layout: TokenLayout, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of the raster, and runs of the text."""
    if layout.grid is None:
        raster_q, raster_k = empty_raster(block_q), empty_raster(block_k)
    else:
        total = int(layout.grid_positions.numel())
        raster_q = run_raster(total, block_q)
        raster_k = raster_q if block_q == block_k else run_raster(total, block_k)
    return query_key_tiles(layout, raster_q, raster_k)
