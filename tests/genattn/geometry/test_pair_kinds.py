"""Kinds of tile pairs: pairs of one kind see the same of each other, and a union looks into each kind once."""

import pytest
import torch

from genattn.geometry import plan_build
from genattn.geometry.pair_kinds import grid_leaves, pair_kinds
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.element_rule import BlockRule, CombinedRule
from genattn.patterns.combine import Intersection, Union
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

PARTS = (RadialPattern(decay=0.4), NeighborhoodPattern((3, 3, 5)))
CASES = [
    (Union(*PARTS), TokenLayout.from_grid((6, 6, 8), text_after=5), 16),
    (Intersection(*PARTS), TokenLayout.from_grid((6, 4, 8), text_before=3), 16),
    (Union(PARTS[1], NeighborhoodPattern((2, 3, 3), dilation=(2, 1, 1))), TokenLayout.from_grid((6, 4, 8)), 16),
]


@pytest.mark.parametrize(("pattern", "layout", "block"), CASES)
def test_pairs_of_one_kind_see_the_same(pattern, layout, block):
    plan = pattern.plan(layout, block, block)
    rule = pattern.rule(layout)
    kinds = pair_kinds(rule, plan.query_tiles, plan.key_tiles)
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(len(plan.query_tiles)), torch.arange(len(plan.key_tiles)),
                                                         indexing="ij"))  # fmt: skip
    names = kinds.of(rows.numpy(), columns.numpy())
    queries, keys = plan.query_tiles[rows].long()[:, :, None], plan.key_tiles[columns].long()[:, None, :]
    seen = rule(queries.clamp_min(0), keys.clamp_min(0))[0] & (queries >= 0) & (keys >= 0)
    first: dict[int, torch.Tensor] = {}
    for name, one in zip(names.tolist(), seen):
        assert torch.equal(one, first.setdefault(name, one))
    assert len(first) < len(names), "of no use otherwise"


def test_a_union_looks_into_each_kind_once(monkeypatch):
    looked, whole = [], []
    stock = plan_build.CombinedCodes._look

    def look(self, head, row, column, step=1):
        looked.append(row.size if step > 1 else 0)
        whole.append(row.size if step == 1 else 0)
        return stock(self, head, row, column, step)

    monkeypatch.setattr(plan_build.CombinedCodes, "_look", look)
    pattern, counts = Union(RadialPattern(), NeighborhoodPattern((3, 9, 9))), []
    for frames in (8, 16):
        looked.clear()
        pattern.build_plan(TokenLayout.from_grid((frames, 24, 32)), 64, 64)
        counts.append(sum(looked))
    assert counts[1] <= 1.5 * counts[0], "twice the frames are four times the pairs, and hardly more kinds"
    assert sum(whole) <= sum(counts) // 4, "most are settled by a few of their elements"


def test_rules_of_other_kinds_have_none():
    layout = TokenLayout.from_grid((2, 4, 4))
    tiles = torch.arange(32, dtype=torch.int32).view(2, 16)
    window = NeighborhoodPattern((2, 2, 2))
    grid, block = window.rule(layout), BlockRule(torch.ones(1, 4, 4, dtype=torch.bool), 8)
    assert pair_kinds(CombinedRule((grid, block)), tiles, tiles) is None
    assert pair_kinds(CombinedRule((grid, window.rule(TokenLayout.from_grid((4, 2, 4))))), tiles, tiles) is None
    assert len(grid_leaves(CombinedRule((grid, CombinedRule((grid, grid), "all"))))) == 3
