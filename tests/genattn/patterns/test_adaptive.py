"""The choice by content with each of its parts exchanged: what it keeps, what it costs, how it runs on every kind of tile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn.errors import GenAttnError
from genattn.functional.dispatch import explain_attention
from genattn.functional.planned import block_plan_for, plan_for, planned_attention
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.kernels.reference.attention import tile_states, visible_mask
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import pattern_from_dict, pattern_to_dict
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern, SiteMemory
from genattn.patterns.published import sol, sparge, svg2
from genattn.patterns.radial import RadialPattern
from genattn.selection.budget import Budget
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import ErrorAware, Threshold, TopK, TopP
from genattn.selection.tiling import Boxes, Clusters, Runs

LAYOUT = TokenLayout((Segment("text", (5,)), Segment("grid", (4, 6, 7)), Segment("padding", (6,))))
GRID = LAYOUT.raster_index >= 0
PATTERNS = [
    AdaptivePattern(),
    AdaptivePattern("top-p"),
    AdaptivePattern(Threshold(0.5, "diag"), tiles=Runs((8, 8)), neighbours=1),
    AdaptivePattern(ErrorAware(0.2), PooledScore(0), Runs((16, 8)), neighbours=1),
    AdaptivePattern(TopK(0.2), guard=Similarity(0.1, of="pairs", queries=True, shut=True)),
    AdaptivePattern(TopK(0.2), inside=RadialPattern(), always=NeighborhoodPattern((1, 3, 3))),
    AdaptivePattern(TopK(0.3), tiles=Clusters(5, 6)),
    AdaptivePattern(ErrorAware(0.3), tiles=Clusters(5, 6)),
]


def _qkv(heads: int = 4, groups: int = 2, batch: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(batch, LAYOUT.seqlen, n, 8, generator=draw) * 2 for n in (heads, groups, groups)]


def _seen(plan: BlockPlan | HeadTiles) -> torch.Tensor:
    """Bool [H, S, S]."""
    if isinstance(plan, BlockPlan):
        return visible_mask(plan)
    whole = visible_mask(plan.folded)[0].view(plan.seqlen, plan.heads, plan.seqlen, plan.heads)
    return torch.stack([whole[:, h, :, h] for h in range(plan.heads)])


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{type(p.selection).__name__}-{type(p.tiles).__name__}")
def test_always_kept_and_right(pattern: AdaptivePattern) -> None:
    """Text both ways, no padding, lists per head, and attention over exactly what is seen, on every kind of tile."""
    query, key, value = _qkv()
    plan = plan_for(query, key, pattern, LAYOUT)
    assert isinstance(plan, BlockPlan | HeadTiles)
    seen = _seen(plan)
    assert seen.shape[0] == plan.num_heads == 4
    assert seen[:, :, :5].all()
    assert seen[:, :5, :-6].all()
    assert not seen[:, :, -6:].any()
    assert plan.full_share == 1.0
    assert 0.05 < plan.density < 1
    mask = torch.zeros(2, LAYOUT.seqlen, dtype=torch.bool)
    mask[0], mask[1, :-20] = True, True
    out = planned_attention(query, key, value, plan, key_mask=mask)
    k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (key, value))
    shown = seen[None] & mask[:, None, None, :]
    wanted = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), k, v, shown).transpose(1, 2)
    assert torch.allclose(out, wanted.nan_to_num(), atol=1e-5)  # type: ignore[arg-type]


def test_every_query_of_the_grid_sees_its_own_place() -> None:
    query, key, _ = _qkv()
    for pattern in PATTERNS[:6]:
        seen = _seen(plan_for(query, key, pattern, LAYOUT))  # type: ignore[arg-type]
        assert seen.diagonal(dim1=1, dim2=2)[:, GRID].all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6))
def test_clusters_of_any_grid_cover_every_token_once(t: int, h: int, w: int, text: int, kq: int, kk: int) -> None:
    layout = TokenLayout.from_grid((t, h, w), text_before=text)
    draw = torch.Generator().manual_seed(t * 100 + h * 10 + w)
    query, key = torch.randn(2, layout.seqlen, 3, 4, generator=draw), torch.randn(2, layout.seqlen, 1, 4, generator=draw)
    tokens = t * h * w
    pattern = AdaptivePattern(TopP(0.5), tiles=Clusters(min(kq, tokens), min(kk, tokens), 2))
    plan = pattern.plan_for(query, key, layout, 8, 4)
    assert isinstance(plan, HeadTiles)
    places = torch.arange(layout.seqlen * 3)
    for tiles in (plan.folded.query_tiles, plan.folded.key_tiles):
        used = tiles[tiles >= 0].long()
        assert torch.equal(used.sort().values, places)
        heads = torch.where(tiles >= 0, tiles % 3, -1)
        assert all(row[row >= 0].unique().numel() <= 1 for row in heads)
    seen = visible_mask(plan.folded)[0]
    assert not (seen & (places[:, None] % 3 != places % 3)).any()
    assert plan.density == pytest.approx(float(_seen(plan).float().mean()))


def test_head_tiles_with_all_mass_are_dense_attention_with_lse() -> None:
    query, key, value = _qkv()
    pattern = AdaptivePattern(TopP(1.0), tiles=Clusters(4, 4))
    out, lse = genattn.attention(query, key, value, pattern, LAYOUT, return_lse=True)
    wanted, right = genattn.attention(query, key, value, DensePattern(), LAYOUT, return_lse=True)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.allclose(lse, right, atol=1e-4)
    assert explain_attention(query, key, value, pattern, LAYOUT)[0]
    with pytest.raises(GenAttnError, match="the same tiles for all heads, got clusters"):
        block_plan_for(query, key, pattern, LAYOUT)
    plan = plan_for(query, key, pattern, LAYOUT)
    with pytest.raises(GenAttnError, match=r"query must be \[B, 179, 4, D\]"):
        planned_attention(query[:, :9], key, value, plan)
    assert isinstance(plan, HeadTiles)
    assert plan.to("cpu") is plan
    assert plan.flops(8, 4) == pytest.approx(4 * 4 * 8 * plan.density * LAYOUT.seqlen**2)
    with pytest.raises(ValueError, match="one list over 4 x 7 places"):
        HeadTiles(plan.folded, 4, 7)


def test_block_topk_is_a_case_of_it() -> None:
    query, key, _ = _qkv()
    case = BlockTopK(keep=0.3, levels=1, min_similarity=0.2)
    general = AdaptivePattern(TopK(0.3), PooledScore(1, weighted=False), guard=Similarity(0.2))
    one, two = case.plan_for(query, key, LAYOUT, 16, 8), general.plan_for(query, key, LAYOUT, 16, 8)
    assert isinstance(one, BlockPlan)
    assert isinstance(two, BlockPlan)
    assert torch.equal(one.columns, two.columns)
    assert torch.equal(one.row_ptr, two.row_ptr)


def test_priors() -> None:
    """Inside: no tile that the prior hides; always: all that the prior shows anything of."""
    query, key, _ = _qkv()
    prior = NeighborhoodPattern((4, 3, 7))
    inside = _seen(AdaptivePattern(TopK(1.0), inside=prior).plan_for(query, key, LAYOUT, 8, 8))
    reach = _seen(prior.plan(LAYOUT, 8, 8))[0]
    tiles = AdaptivePattern(TopK(1.0)).plan_for(query, key, LAYOUT, 8, 8)
    assert isinstance(tiles, BlockPlan)
    home = torch.empty(LAYOUT.seqlen, dtype=torch.long)
    for tile, row in enumerate(tiles.query_tiles):
        home[row[row >= 0].long()] = tile
    pair = torch.zeros(int(home.max()) + 1, int(home.max()) + 1)
    pair.index_put_((home[:, None].expand_as(reach), home.expand_as(reach)), prior.mask(LAYOUT).float(), accumulate=True)
    shown = (pair > 0)[home][:, home] & (LAYOUT.raster_index != -2)
    assert torch.equal(inside[0], shown)
    always = _seen(AdaptivePattern(TopK(0.01), always=prior).plan_for(query, key, LAYOUT, 8, 8))
    assert (always | ~shown).all()


def test_text_is_neither_chosen_nor_counted() -> None:
    """A long text leaves the share of the grid's own tiles what was asked for."""
    layout = TokenLayout.from_grid((4, 8, 8), text_after=300)
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, layout.seqlen, 2, 8, generator=draw) for _ in range(2))
    for rule in (TopK(0.25), ErrorAware(0.25)):
        seen = _seen(AdaptivePattern(rule).plan_for(query, key, layout, 16, 16))
        grid = seen[:, :256, :256].float().mean((1, 2))
        assert ((grid >= 0.25) & (grid <= 0.25 + 1 / 16)).all()  # and its own place
        assert seen[:, :, 256:].all()


def test_text_alone_is_dense() -> None:
    layout = TokenLayout((Segment("text", (9,)),))
    x = torch.randn(1, 9, 2, 4)
    for pattern in (AdaptivePattern(), AdaptivePattern(tiles=Runs())):
        assert plan_for(x, x, pattern, layout).density == 1.0  # type: ignore[union-attr]


def test_budget_by_layer_step_and_head() -> None:
    pattern = AdaptivePattern(TopK(0.5), budget=Budget((0.1, (0.2, 0.4)), ((0.5, 2.0), (1.0, 1.0))))
    second = pattern.for_layer(1, 2)
    assert second.selection == TopK((0.2, 0.4))
    assert second.for_step(fraction=0.1).selection == TopK((0.4, 0.8))
    assert second.for_step(fraction=0.8).for_heads(1, 1).selection == TopK((0.4,))
    assert second.for_step(fraction=None).selection == TopK((0.2, 0.4))
    assert pattern.for_layer(0, 2).selection == TopK(0.1)
    with pytest.raises(GenAttnError, match="one amount per layer"):
        pattern.for_layer(2, 3)
    per_layer = RadialPattern(layer_decay=(0.2, 0.9))
    assert AdaptivePattern(inside=per_layer).for_layer(1, 2).inside == RadialPattern(decay=0.9)
    per_head = RadialPattern(decay=(0.2, 0.9))
    assert AdaptivePattern(always=per_head).for_heads(1, 1).always == RadialPattern(decay=(0.9,))


def test_plans_are_kept_over_steps_and_passes() -> None:
    query, key, _ = _qkv()
    pattern = AdaptivePattern(refresh_every=2, share_passes=True)
    memory = SiteMemory(0, "cond")
    first = pattern.plan_for(query, key, LAYOUT, memory=memory)
    memory.pass_name = "uncond"
    assert pattern.plan_for(-query, key, LAYOUT, memory=memory) is first
    memory.step = 1
    assert pattern.plan_for(-query, key, LAYOUT, memory=memory) is first
    memory.step = 2
    assert pattern.plan_for(-query, key, LAYOUT, memory=memory) is not first
    alone, memory = AdaptivePattern(), SiteMemory(0, "cond")
    first = alone.plan_for(query, key, LAYOUT, memory=memory)
    assert alone.plan_for(query, key, LAYOUT, memory=memory) is first
    memory.pass_name = "uncond"
    assert alone.plan_for(query, key, LAYOUT, memory=memory) is not first
    nameless = SiteMemory(0, None)
    assert alone.plan_for(query, key, LAYOUT, memory=nameless) is not alone.plan_for(query, key, LAYOUT, memory=nameless)
    unknown = SiteMemory()
    assert alone.plan_for(query, key, LAYOUT, memory=unknown) is not alone.plan_for(query, key, LAYOUT, memory=unknown)


COMBINED = {
    "union": lambda parts: Union(*parts, NeighborhoodPattern((2, 2, 3))),
    "intersection": lambda parts: Intersection(NeighborhoodPattern((4, 5, 5)), *parts),
    "one of them": lambda parts: Union(parts[1]),
    "per head": lambda parts: PerHead(parts, (0, 1, 1, 0)),
    "clusters": lambda _: Union(AdaptivePattern(tiles=Clusters(5, 6), refresh_every=2), NeighborhoodPattern((2, 2, 3))),
}


@pytest.mark.parametrize("name", COMBINED)
def test_parts_of_a_combination_are_chosen_anew_as_often_as_each_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(self: AdaptivePattern, how: str, make: Callable[..., Any], *given: Any) -> Any:
        made.append(how if how == "clusters" else f"{self.chosen_by.amount}")
        return make(self, *given)

    for where, how in (("_listed", "boxes"), ("_clustered", "clusters")):
        make = getattr(AdaptivePattern, where)
        monkeypatch.setattr(AdaptivePattern, where, lambda self, *given, h=how, m=make: noted(self, h, m, *given))
    parts = AdaptivePattern(TopK(0.3), refresh_every=3), AdaptivePattern(TopP(0.4), refresh_every=2)
    pattern: Pattern = COMBINED[name](parts)
    (query, key, _), memory = _qkv(batch=1), SiteMemory()
    plans, choices = [], []
    for memory.step in range(6):
        memory.pass_name = "cond"
        made.clear()
        plans.append(pattern.plan_for(query * (1 + memory.step), key, LAYOUT, 16, 16, memory))
        choices.append(sorted(made))
        memory.pass_name = "uncond"  # the other pass has a choice of its own
        assert pattern.plan_for(-query, key, LAYOUT, 16, 16, memory) is not plans[-1]
    every = {"one of them": [[], ["0.4"]], "clusters": [[], ["clusters"]]}.get(name)
    both = [["0.3", "0.4"], [], ["0.4"], ["0.3"], ["0.4"], []]
    assert choices == (both if every is None else [every[step % 2 == 0] for step in range(6)])
    assert [plans[n] is plans[n - 1] for n in range(1, 6)] == [not chosen for chosen in choices[1:]]


def test_centres_are_carried_to_the_next_step() -> None:
    query, key, _ = _qkv()
    pattern = AdaptivePattern(tiles=Clusters(4, 4, iterations=1, step_iterations=1))
    memory = SiteMemory(0)
    pattern.plan_for(query, key, LAYOUT, memory=memory)
    first = memory.kept["key centres", None]
    memory.step = 1
    pattern.plan_for(query, key, LAYOUT, memory=memory)
    second = memory.kept["key centres", None]
    points = key[:, GRID].permute(2, 1, 0, 3).flatten(2)

    def far(centres: torch.Tensor) -> float:
        return float(torch.cdist(points, centres).amin(-1).square().sum())

    assert far(second) < far(first)


def test_union_intersection_and_per_head_take_it() -> None:
    query, key, value = _qkv()
    chosen, window = AdaptivePattern(TopK(0.2)), NeighborhoodPattern((2, 3, 3))
    block = (16, 16)
    alone = _seen(chosen.plan_for(query, key, LAYOUT, *block))
    still = window.mask(LAYOUT)
    for combined, wanted in ((Union(chosen, window), alone | still), (Intersection(window, chosen), alone & still)):
        plan = combined.plan_for(query, key, LAYOUT, *block)
        assert torch.equal(_seen(plan), wanted)
        assert combined.needs_tensors
    split = PerHead((chosen, window, DensePattern()), (0, 1, 0, 2))
    found = _seen(split.plan_for(query, key, LAYOUT, *block))
    whole = DensePattern().mask(LAYOUT)
    assert torch.equal(found, torch.stack([alone[0], still, alone[2], whole]))
    assert genattn.attention(query, key, value, split, LAYOUT).shape == query.shape
    assert Union(window, RadialPattern()).plan_for(query, key, LAYOUT) is Union(window, RadialPattern()).plan(LAYOUT)
    assert split.for_heads(0, 2).plan_for(query[:, :, :2], key[:, :, :1], LAYOUT).num_heads == 2
    budget = AdaptivePattern(TopK(0.2), budget=Budget(steps=((1.0, 2.0),)))
    assert Union(budget, window).for_step(fraction=0.5) == Union(AdaptivePattern(TopK(0.4), budget=Budget()), window)
    assert PerLayer((budget,), (0, 0)).for_step(fraction=0.5).for_layer(1, 2).selection == TopK(0.4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", [NeighborhoodPattern((2, 3, 3)), RadialPattern(decay=(0.2, 0.4, 0.8, 2.0), block=8)])
def test_clusters_in_a_union_and_an_intersection(other: Pattern) -> None:
    """With one rule for all heads and with one per head; what is computed is what is seen."""
    query, key, value = _qkv()
    chosen = svg2(0.4, 0.0, 5, 6, iterations=3, tail=None)
    alone, still = _seen(chosen.plan_for(query, key, LAYOUT, 16, 8)), other.mask(LAYOUT)  # type: ignore[arg-type]
    for combined, wanted in ((Union(chosen, other), alone | still), (Intersection(other, chosen), alone & still)):
        plan = combined.with_tail(None).plan_for(query, key, LAYOUT, 16, 8)
        assert isinstance(plan, HeadTiles)
        assert torch.equal(_seen(plan), wanted)
        out = planned_attention(query, key, value, plan)
        k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (key, value))
        right = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), k, v, wanted).transpose(1, 2)
        assert torch.allclose(out, right.nan_to_num(), atol=1e-5)  # type: ignore[arg-type]
        tailed = combined.with_tail("mean").plan_for(query, key, LAYOUT, 16, 8)
        assert tailed.tail is not None
        assert tailed.full_share == 1.0  # what is visited is then seen whole
        assert (_seen(tailed) | ~wanted).all()


def test_combinations_that_cannot_be() -> None:
    query, key, _ = _qkv()
    chosen, window = AdaptivePattern(), NeighborhoodPattern((2, 3, 3))
    with pytest.raises(GenAttnError, match="cannot hold another combination with a pattern that looks at the tensors"):
        Union(window, Intersection(chosen, window)).plan_for(query, key, LAYOUT)
    with pytest.raises(GenAttnError, match="must have the same tiles"):
        Union(chosen, AdaptivePattern(tiles=Runs((8, 8)))).plan_for(query, key, LAYOUT)
    with pytest.raises(GenAttnError, match="clusters are tiles of each head's own"):
        Union(chosen, AdaptivePattern(tiles=Clusters(3, 3))).plan_for(query, key, LAYOUT)
    with pytest.raises(GenAttnError, match="one entry per head, got 2 entries for 4 heads"):
        PerHead((chosen, window)).plan_for(query, key, LAYOUT)


def test_saved_and_read() -> None:
    for pattern in [*PATTERNS, sol(), sparge(), svg2(), Union(AdaptivePattern("top-p"), RadialPattern())]:
        assert pattern_from_dict(pattern_to_dict(pattern)) == pattern
    with pytest.raises(GenAttnError, match="the description of a TopK is damaged"):
        pattern_from_dict({"type": "AdaptivePattern", "selection": {"type": "TopK", "shares": 0.3}})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AdaptivePattern("best"), "rule must be one of top-k"),
        (lambda: AdaptivePattern(0.3), "selection must be a rule such as TopK"),  # type: ignore[arg-type]
        (lambda: AdaptivePattern(tiles=3), "tiles must be a tiling such as Boxes"),  # type: ignore[arg-type]
        (lambda: AdaptivePattern(neighbours=-1), "neighbours must be a whole number >= 0, got -1"),
        (lambda: AdaptivePattern(refresh_every=0), "refresh_every must be a whole number >= 1, got 0"),
        (lambda: AdaptivePattern(inside=BlockTopK()), "inside must be a pattern of geometry alone"),
        (
            lambda: AdaptivePattern(inside=LogitDecayed(RadialPattern(), 3)),
            "inside cannot hold LogitDecayed, whose logits it would leave; put LogitDecayed around all",
        ),
        (lambda: AdaptivePattern(always=LogitDecayed(RadialPattern(), 3)), "always cannot hold LogitDecayed"),
        (lambda: AdaptivePattern(always=3), "always must be a pattern of geometry alone"),  # type: ignore[arg-type]
        (lambda: AdaptivePattern(tiles="clusters", inside=RadialPattern()), "inside needs tiles that are places, got clusters"),
        (lambda: AdaptivePattern(tiles=Clusters(9999)).check(LAYOUT), "must be at most the 168 tokens of the grid, got 9999"),
        (lambda: AdaptivePattern().plan(LAYOUT), "AdaptivePattern looks at the queries and keys; call plan_for"),
        (lambda: AdaptivePattern(inside=NeighborhoodPattern((9, 9, 9))).check(LAYOUT), "window_size"),
        (lambda: AdaptivePattern().plan_for(torch.zeros(1, 9, 2, 8), torch.zeros(1, 9, 2, 8), LAYOUT), r"\[B, 179, H, D\]"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()  # type: ignore[operator]


def test_boxes_with_sides_of_their_own() -> None:
    query, key, _ = _qkv()
    plan = AdaptivePattern(tiles=Boxes((16, 8))).plan_for(query, key, LAYOUT, 128, 128)
    assert isinstance(plan, BlockPlan)
    assert (plan.block_q, plan.block_k) == (16, 8)


def test_a_tile_of_the_first_token_alone_is_listed() -> None:
    layout = TokenLayout((Segment("text", (1,)), Segment("grid", (2, 4, 4))))
    pattern = AdaptivePattern(TopK(0.1), tiles=Boxes())
    query, key = torch.randn(2, 1, layout.seqlen, 2, 8)
    found = pattern.listing(query, key, layout, 16, 16)
    (alone,) = [place for place, tile in enumerate(found.key_tiles.tolist()) if [t for t in tile if t >= 0] == [0]]
    assert found.listed[:, :, alone].all(), "text is always seen"


def test_error_aware_choice_knows_what_stands_in() -> None:
    """A tile of two groups of equal keys is lost under one mean and stood in for exactly by two."""
    layout = TokenLayout.from_grid((1, 4, 8))
    draw = torch.Generator().manual_seed(0)
    query, key = torch.ones(1, 32, 1, 4), 0.3 * torch.randn(1, 32, 1, 4, generator=draw)
    key[:, 8:16] = torch.tensor([2.0, -2.0]).repeat(4)[None, :, None, None]  # wide, but two groups
    rows = {}
    for tail in ("mean", "mean2"):
        pattern = AdaptivePattern(ErrorAware(0.25), PooledScore(0), Runs((8, 8)), tail=tail)
        plan = pattern.plan_for(query, key, layout, 8, 8)
        rows[tail] = tile_states(plan)[0] > 0
    others = torch.arange(4) != 1
    assert bool(rows["mean"][others, 1].all()), "one mean of 2 and -2 is the worst stand-in"
    assert not bool(rows["mean2"][others, 1].any())
