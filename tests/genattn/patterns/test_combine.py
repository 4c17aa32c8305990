"""Unions, intersections, per-head and per-layer choice, and global tokens: masks by logic, plans by the rule."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from layout_draws import layouts
from plan_checks import assert_plan_is_exact

from genattn.errors import GenAttnError
from genattn.geometry import plan_build
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.attention import visible_mask
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

SINGLE: list[Pattern] = [
    RadialPattern(variant="paper"),
    RadialPattern(block=2, decay=0.3, sink=False),
    RadialPattern(block=2, window="box"),
    RadialPattern(variant="official", block=4),
    NeighborhoodPattern(1),
    NeighborhoodPattern((-1, -1, 2), stride=(1, 1, 2)),
    DensePattern(),
]
VIDEO = TokenLayout.from_grid((5, 4, 6), text_after=3)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TokenLayout, list[Pattern]]:
    layout = draw(layouts(longest=6, axes=(3, 3)).filter(lambda x: x.grid3[2] > 1))
    return layout, draw(st.lists(st.sampled_from(SINGLE), min_size=1, max_size=3))


@given(cases(), st.sampled_from([4, 16]), st.sampled_from([4, 7]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_combinations_are_logic(case: tuple[TokenLayout, list[Pattern]], block_q: int, block_k: int) -> None:
    layout, parts = case
    masks = torch.stack([p.mask(layout) for p in parts])
    padding = layout.raster_index == -2
    for pattern, expected in ((Union(*parts), masks.any(0)), (Intersection(*parts), masks.all(0)), (PerHead(parts), masks)):
        mask = pattern.mask(layout)
        assert torch.equal(mask.view(-1, *mask.shape[-2:]), expected.view(-1, *mask.shape[-2:]))
        assert_plan_is_exact(pattern.plan(layout, block_q, block_k), mask, padding)


@given(cases(), st.sampled_from([4, 16]), st.sampled_from([None, (1, 2, 2), (2, 3, 1)]), st.sampled_from([(), (0,), (-1, 0)]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_global_tokens(
    case: tuple[TokenLayout, list[Pattern]], block: int, every: tuple[int, int, int] | None, frames: tuple[int, ...]
) -> None:
    layout, parts = case
    inner = Union(*parts) if len(parts) > 1 else parts[0]
    pattern = GlobalTokens(inner, frames=frames or ((0,) if every is None else ()), every=every)
    mask, expected = pattern.mask(layout), inner.mask(layout).clone()
    padding, chosen = layout.raster_index == -2, pattern.tokens(layout)
    expected[chosen] = ~padding
    expected[:, chosen] = True
    assert torch.equal(mask, expected)
    assert_plan_is_exact(pattern.plan(layout, block, block), mask, padding)


def test_beyond_the_exact_budget_nothing_visible_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Intersection(SINGLE[0], NeighborhoodPattern((3, 3, 3)))
    exact = pattern.build_plan(VIDEO, 8, 8)
    monkeypatch.setattr(plan_build, "EXACT_ELEMENTS", 0)
    loose = pattern.build_plan(VIDEO, 8, 8)
    assert bool((visited(exact) <= visited(loose)).all())
    assert int(loose.num_full.sum()) <= int(exact.num_full.sum())


def visited(plan: BlockPlan) -> torch.Tensor:
    """Bool [N, NQ, NK], the tile pairs that a plan lists."""
    out = torch.zeros(plan.num_heads, plan.query_tiles.shape[0], plan.key_tiles.shape[0], dtype=torch.bool)
    for head, pointers in enumerate(plan.row_ptr.tolist()):
        for row, (first, last) in enumerate(pairwise(pointers)):
            out[head, row, plan.columns[first:last].long()] = True
    return out


def test_the_budget_counts_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one tile pair of 8 x 8 tokens is room for none of 16 x 16."""
    pattern = Intersection(SINGLE[0], NeighborhoodPattern((3, 3, 3)))
    looked: dict[int, tuple[Any, int]] = {}  # every choice of tiles that is weighed has a budget of its own
    stock = plan_build.CombinedCodes._look

    def look(self: Any, head: int, row: Any, column: Any, step: int = 1) -> Any:
        if step == 1:
            before = looked.get(id(self), (self, 0))[1]
            looked[id(self)] = self, before + row.size * self.tiles[0].shape[1] * self.tiles[1].shape[1]
        return stock(self, head, row, column, step)

    monkeypatch.setattr(plan_build.CombinedCodes, "_look", look)
    for budget in (100, 3000, 100_000):
        monkeypatch.setattr(plan_build, "EXACT_ELEMENTS", budget)
        monkeypatch.setattr(plan_build, "_LOOKED_UP", 64)
        looked.clear()
        pattern.build_plan(VIDEO, 8, 8)
        assert all(elements <= budget for _, elements in looked.values())
    assert looked


@pytest.mark.parametrize("pattern", [Union(SINGLE[0], NeighborhoodPattern((3, 3, 3))), Intersection(SINGLE[0], SINGLE[1])])
def test_long_sequences_are_planned_in_turns(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = visited(pattern.build_plan(VIDEO, 8, 8))
    monkeypatch.setattr(plan_build, "_CHUNK", 1)  # one query tile at a time
    plan = pattern.build_plan(VIDEO, 8, 8)
    assert torch.equal(visited(plan), whole)
    assert_plan_is_exact(plan, pattern.mask(VIDEO), VIDEO.raster_index == -2)


def test_per_head_takes_the_cheaper_tiles() -> None:
    """Box tiles of the windows beat the strips of Radial when most heads are windows."""
    layout = TokenLayout.from_grid((8, 16, 16))
    window = NeighborhoodPattern((4, 8, 8), stride=(2, 8, 8))
    pattern = PerHead((window, RadialPattern()), (0, 0, 0, 1))
    plan = pattern.plan(layout)
    assert plan.num_heads == 4
    assert torch.equal(plan.query_tiles, window.plan(layout).query_tiles)
    assert torch.equal(plan.row_ptr[1] - plan.row_ptr[1, 0], plan.row_ptr[0])


@pytest.mark.parametrize("combine", [Union, Intersection])
def test_a_choice_per_head_can_be_a_part(combine: type[Union] | type[Intersection]) -> None:
    per_head = PerHead((NeighborhoodPattern(3), NeighborhoodPattern((1, 3, 3)), RadialPattern(block=2)), (2, 0, 1, 0))
    pattern = combine(per_head, RadialPattern(block=2, decay=0.3, sink=False))
    masks, other = per_head.mask(VIDEO), pattern.patterns[1].mask(VIDEO)
    expected = masks | other if combine is Union else masks & other
    assert torch.equal(pattern.mask(VIDEO), expected)
    assert_plan_is_exact(pattern.plan(VIDEO, 4, 8), expected, VIDEO.raster_index == -2)


def test_layers() -> None:
    pattern = PerLayer((DensePattern(), RadialPattern(layer_decay=(0.2, 0.5, 1.0))), (0, 1, 1))
    assert pattern.for_layer(0, 3) == DensePattern()
    assert pattern.for_layer(2, 3) == RadialPattern(decay=1.0)
    nested = Union(pattern, GlobalTokens(NeighborhoodPattern(3), frames=(0,))).for_layer(1, 3)
    assert nested == Union(RadialPattern(decay=0.5), GlobalTokens(NeighborhoodPattern(3), frames=(0,)))
    assert PerHead((pattern, DensePattern())).for_layer(0, 3) == PerHead((DensePattern(), DensePattern()))
    with pytest.raises(GenAttnError, match="one entry per layer, got 3 entries for layer 0 of 4"):
        pattern.for_layer(0, 4)
    for call in (pattern.mask, pattern.plan, pattern.rule):
        with pytest.raises(GenAttnError, match="for_layer"):
            call(VIDEO)


def test_bad_settings() -> None:
    with pytest.raises(GenAttnError, match="at least one pattern"):
        Union()
    with pytest.raises(GenAttnError, match="at least one pattern"):
        Intersection("radial")  # type: ignore[arg-type]
    with pytest.raises(GenAttnError, match=r"choice must name a pattern 0..1 for every head, got \(0, 2\)"):
        PerHead((DensePattern(), RadialPattern()), (0, 2))
    with pytest.raises(GenAttnError, match="same for all heads"):
        PerHead((RadialPattern(decay=(0.2, 1.0)), DensePattern())).plan(VIDEO)
    with pytest.raises(GenAttnError, match="agree on the number of heads"):
        Union(RadialPattern(decay=(0.2, 1.0)), RadialPattern(decay=(0.2, 1.0, 2.0))).plan(VIDEO)
    with pytest.raises(GenAttnError, match="nearest legal window_size: 5"):
        Union(DensePattern(), NeighborhoodPattern((9, 3, 3))).plan(VIDEO)
    with pytest.raises(GenAttnError, match="frames or every"):
        GlobalTokens(DensePattern())
    with pytest.raises(GenAttnError, match="every must be a step"):
        GlobalTokens(DensePattern(), every=(1, 0, 2))
    with pytest.raises(GenAttnError, match=r"every must give a step >= 1 for frames, height and width, got \(1, 2\)"):
        GlobalTokens(DensePattern(), every=(1, 2))
    with pytest.raises(GenAttnError, match=r"between -5 and 4, got \[5\]"):
        GlobalTokens(DensePattern(), frames=(0, 5)).plan(VIDEO)
    with pytest.raises(GenAttnError, match=r"between -5 and 4, got \[-6\]"):
        GlobalTokens(DensePattern(), frames=(0, -6)).plan(VIDEO)
    first, last = (GlobalTokens(NeighborhoodPattern(3), frames=frames).plan(VIDEO) for frames in ((0, -1), (-5, 4)))
    assert torch.equal(visible_mask(first), visible_mask(last)), "both ends are frames"


def test_two_patterns_of_different_heads_share_lists() -> None:
    plan = Union(RadialPattern(decay=(0.2, 1.0), block=2), NeighborhoodPattern((3, 3, 3))).plan(VIDEO, 8, 8)
    assert plan.num_heads == 2


@pytest.mark.parametrize(
    "pattern",
    [
        PerHead((RadialPattern(block=2), DensePattern(), NeighborhoodPattern(3)), (0, 2, 1, 0)),
        RadialPattern(decay=(0.2, 0.5, 1.0, 2.0), block=2),
        Union(RadialPattern(decay=(0.2, 0.5, 1.0, 2.0), block=2), NeighborhoodPattern(3)),
        GlobalTokens(RadialPattern(decay=(0.2, 0.5, 1.0, 2.0), block=2), frames=(0,)),
        NeighborhoodPattern(3),
    ],
)
def test_some_of_the_heads_follow_their_own_part(pattern: Pattern) -> None:
    """As processes that share the heads of one attention need it."""
    whole = pattern.mask(VIDEO)
    for first, count in ((0, 2), (2, 2), (1, 1)):
        part = pattern.for_heads(first, count)
        mask = part.mask(VIDEO)
        expected = whole[first : first + count] if whole.ndim == 3 else whole
        assert torch.equal(mask.expand_as(expected), expected)
        assert part.plan(VIDEO, 8, 8).num_heads in (1, count)
