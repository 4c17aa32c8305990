"""Plans at real sizes: drawn tile pairs against the rule, and what the builders refuse."""

import numpy as np
import pytest
import torch

from genattn.errors import GenAttnError
from genattn.geometry.plan_build import plan_from_rule, tile_codes
from genattn.geometry.tiles import best_box, cell_raster, token_coords
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.element_rule import ElementRule
from genattn.patterns.combine import Intersection, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.show import plan_codes

WAN = TokenLayout.from_grid((21, 45, 80))
HUNYUAN = TokenLayout.from_grid((33, 45, 80), text_after=256)
LONG = TokenLayout.from_grid((128, 45, 80))
RANKS = TokenLayout(
    (
        Segment("text", (113,)),
        Segment("grid", (13, 30, 45), 0, 8775),
        Segment("text", (113,)),
        Segment("grid", (13, 30, 45), 8775),
    )
)
CASES: list[tuple[Pattern, TokenLayout]] = [
    (RadialPattern(), LONG),
    (RadialPattern(variant="paper"), HUNYUAN),
    (RadialPattern(window="box"), WAN),
    (RadialPattern(variant="official", model="hunyuan"), HUNYUAN),
    (RadialPattern(variant="paper"), RANKS),
    (NeighborhoodPattern((10, 24, 40)), WAN),
    (NeighborhoodPattern((4, 11, 9), dilation=(2, 3, 4)), HUNYUAN),
    (NeighborhoodPattern((9, 13, 17), stride=(2, 3, 4), is_causal=(True, False, False)), RANKS),
    (NeighborhoodPattern((2048,), stride=(16,)), TokenLayout.from_grid((100_003,))),
]


@pytest.mark.parametrize(
    ("pattern", "layout"), CASES, ids=lambda x: x.describe() if isinstance(x, TokenLayout) else str(x)[:50]
)
def test_drawn_tile_pairs_at_real_sizes(pattern: Pattern, layout: TokenLayout) -> None:
    plan, rule = pattern.plan(layout, 128, 128), pattern.rule(layout)
    codes = plan_codes(plan)
    rng = np.random.default_rng(0)
    # borders of the plan are rare among drawn pairs, so half are drawn next to a change of code
    change = np.argwhere(np.diff(codes.astype(np.int8), axis=1))
    pairs = np.concatenate([rng.integers(0, codes.shape, (150, 2)), change[rng.integers(0, len(change), 150)]])
    for row, column in pairs:
        query, key = plan.query_tiles[row].long(), plan.key_tiles[column].long()
        seen = rule(query[query >= 0][:, None], key[key >= 0][None])[0]
        assert codes[row, column] == int(seen.any()) + int(seen.all()), (row, column)


def test_no_s_by_s_memory() -> None:
    """The longest plan's lists against one bit per pair of tokens."""
    plan = RadialPattern().plan(LONG)
    lists = sum(
        x.numel() * x.element_size() for x in (plan.query_tiles, plan.key_tiles, plan.row_ptr, plan.columns, plan.num_full)
    )
    assert lists < LONG.seqlen**2 / 8 / 1000


def test_parts_that_only_together_settle_a_tile_pair() -> None:
    """Every part leaves the tiles on the diagonal open: the union fills them, the intersection empties those beside them."""
    layout = TokenLayout.from_grid((64, 1, 1))
    near = NeighborhoodPattern((7, -1, -1))
    apart = [NeighborhoodPattern((3, -1, -1), dilation=(by, 1, 1)) for by in (4, 5, 6, 7)]
    union = Union(near, *apart).plan(layout, 8, 8)
    assert union.num_full.tolist() == [[1] * 8]
    even, odd = NeighborhoodPattern((3, -1, -1), dilation=(2, 1, 1)), NeighborhoodPattern((3, -1, -1), dilation=(3, 1, 1))
    both = Intersection(even, odd).plan(layout, 8, 8)
    assert [both.columns[both.row_ptr[0, i] : both.row_ptr[0, i + 1]].tolist() for i in range(2, 6)] == [[2], [3], [4], [5]]


class _OddRule:
    num_heads = 1

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        return ((query_index + key_index) % 2 == 0)[None]

    def to(self, device: torch.device | str) -> "_OddRule":
        return self


class _OddPattern(DensePattern):
    def rule(self, layout: TokenLayout) -> ElementRule:
        return _OddRule()

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        return DensePattern().plan(layout, block_q, block_k)


def test_rules_that_geometry_does_not_define() -> None:
    tiles = run_tiles(8, 4)
    with pytest.raises(TypeError, match="no analytic tile codes for _OddRule"):
        tile_codes(_OddRule(), tiles, tiles)
    with pytest.raises(TypeError, match="_OddRule"):
        plan_from_rule(_OddRule(), tiles, tiles, 8)
    with pytest.raises(GenAttnError, match="GlobalTokens does not serve _OddRule"):
        GlobalTokens(_OddPattern(), frames=(0,)).plan(TokenLayout.from_grid((2, 2, 2)))


def test_tiles_that_hold_too_much() -> None:
    orders = [np.arange(4), np.arange(6)]
    edges = [np.array([0, 4]), np.array([0, 3, 6])]
    assert cell_raster(orders, edges, 16).shape == (2, 16)
    with pytest.raises(ValueError, match=r"at most 11 tokens, got boxes of \[4, 3\]"):
        cell_raster(orders, edges, 11)


@pytest.mark.parametrize(("height", "width", "block"), [(45, 80, 128), (30, 52, 128), (1, 1, 128), (7, 3, 4), (64, 64, 64)])
def test_best_box_fits_the_block(height: int, width: int, block: int) -> None:
    rows, columns = best_box(height, width, block)
    assert -(-height // rows) * -(-width // columns) <= block
    assert 1 <= rows <= height
    assert 1 <= columns <= width


def test_coordinates_of_a_cut_grid() -> None:
    layout = TokenLayout(
        (Segment("grid", (2, 2, 3), 5, 12), Segment("text", (1,)), Segment("grid", (2, 2, 3), 0, 5), Segment("padding", (1,)))
    )
    coords = token_coords(layout, (2, 2, 3)).tolist()
    assert coords[0] == [0, 1, 2]
    assert coords[7] == [-1, 0, 0]
    assert coords[8] == [0, 0, 0]
    assert coords[-1] == [-2, 0, 0]
