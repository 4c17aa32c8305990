"""`tail` as a setting of every pattern: where it takes effect, what it leaves alone, what it refuses."""

import dataclasses
import logging

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.functional.planned import plan_for
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.tail import TAILS
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.patterns import pattern as pattern_module
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import TYPES, pattern_from_dict, pattern_to_dict
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.selection.rules import ErrorAware, TopK
from genattn.selection.tiling import Clusters

LAYOUT = TokenLayout.from_grid((6, 8, 8), text_before=5, text_after=3)
WINDOW = NeighborhoodPattern((3, 4, 4))
RADIAL = RadialPattern(decay=0.1, floor=0)
EVERY = {
    "radial": dataclasses.replace(RADIAL, tail="mean"),
    "official": RadialPattern(variant="official", block=16, tail="mean"),
    "window": dataclasses.replace(WINDOW, tail="mean"),
    "global": GlobalTokens(WINDOW, frames=(0,), tail="mean"),
    "global, inner's": GlobalTokens(dataclasses.replace(WINDOW, tail="mean"), frames=(0,)),
    "union": Union(RADIAL, WINDOW, tail="mean"),
    "union, first's": Union(dataclasses.replace(RADIAL, tail="mean"), WINDOW),
    "intersection": Intersection(RADIAL, WINDOW, tail="mean"),
    "heads": PerHead((WINDOW, RADIAL), (0, 1), tail="mean"),
    "heads, their own": PerHead(tuple(dataclasses.replace(p, tail="mean") for p in (WINDOW, RADIAL)), (0, 1)),
    "top-k": BlockTopK(0.25, tail="mean"),
    "error-aware": AdaptivePattern(ErrorAware(0.25), tail="mean"),
    "clusters": AdaptivePattern(TopK(0.25), tiles=Clusters(8, 24), tail="mean"),
    "top-k in radial": Intersection(BlockTopK(0.25), RADIAL, tail="mean"),
    "heads, one by content": PerHead((BlockTopK(0.25), WINDOW), (0, 1), tail="mean"),
}


def _inputs(heads=2, dim=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LAYOUT.seqlen, heads, dim, generator=draw) for _ in range(3)]


def _smooth(seed=0):
    """Keys and values that vary slowly over the grid: what a trained model's look like beside noise."""
    query, key, value = _inputs(seed=seed)
    places = LAYOUT.grid_positions
    for x in (key, value):
        slow = torch.nn.functional.avg_pool3d(x[0, places].view(6, 8, 8, -1).permute(3, 0, 1, 2), (1, 5, 5), 1, (0, 2, 2))
        x[0, places] = slow.permute(1, 2, 3, 0).reshape(len(places), *x.shape[2:]) * 4
    return query, key, value


@pytest.mark.parametrize("name", EVERY)
def test_every_pattern_takes_a_tail(name):
    pattern, inputs = EVERY[name], _smooth()
    plan = plan_for(inputs[0], inputs[1], pattern, LAYOUT)
    assert plan.tail is not None
    assert plan.tail.kind == "mean"
    out = genattn.attention(*inputs, pattern, LAYOUT)
    torch.testing.assert_close(out, genattn.attention(*inputs, pattern, LAYOUT, impl="reference"), atol=1e-5, rtol=1e-4)
    dense = genattn.attention(*inputs, DensePattern(), LAYOUT)
    without = genattn.attention(*inputs, pattern_without(pattern), LAYOUT)
    assert (out - dense).norm() < (without - dense).norm(), "the stand-in must come nearer to dense attention"


def pattern_without(pattern):
    if isinstance(pattern, PerHead):
        return PerHead(pattern.patterns, pattern.choice, tail=None)
    return pattern.with_tail(None)


@pytest.mark.parametrize("name", EVERY)
def test_text_is_seen_exactly(name):
    """No pseudo-key holds a text token that some query skips, and text queries see every key itself."""
    inputs = _inputs()
    plan = plan_for(inputs[0], inputs[1], EVERY[name], LAYOUT)
    if isinstance(plan, BlockPlan):
        _no_text_stood_in_for(plan)
    text = (LAYOUT.raster_index < 0).nonzero().flatten()
    dense = genattn.attention(*inputs, DensePattern(), LAYOUT)
    out = genattn.attention(*inputs, EVERY[name], LAYOUT)
    torch.testing.assert_close(out[:, text], dense[:, text], atol=1e-5, rtol=1e-4)


def _no_text_stood_in_for(plan):
    text = (LAYOUT.raster_index < 0).nonzero().flatten()
    holds = torch.isin(plan.tail.tokens, text.to(torch.int32)).any(1)
    assert not plan.tail.stands_in()[..., holds].any()


@pytest.mark.parametrize("pattern", [RadialPattern(), WINDOW, BlockTopK(), Union(RADIAL, WINDOW), PerHead((RADIAL, WINDOW))])
def test_a_plain_call_has_no_tail_unless_asked(pattern):
    """In `attention` the pattern's mask is the definition."""
    inputs = _inputs()
    assert plan_for(inputs[0], inputs[1], pattern, LAYOUT).tail is None


def test_padding_is_never_counted():
    layout = TokenLayout((*LAYOUT.segments, genattn.geometry.token_layout.Segment("padding", (20,))))
    pattern = dataclasses.replace(WINDOW, tail="mean")
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, layout.seqlen, 2, 16, generator=draw) for _ in range(3)]
    out = genattn.attention(*inputs, pattern, layout)
    for x in inputs[1:]:
        x[:, layout.raster_index == -2] = 1e4
    torch.testing.assert_close(genattn.attention(*inputs, pattern, layout), out)


def test_what_visits_everything_is_bit_equal_and_says_once_that_it_has_no_effect(caplog, monkeypatch):
    monkeypatch.setattr(pattern_module, "_SAID", set())
    inputs = _inputs()
    with caplog.at_level(logging.WARNING, logger="genattn"):
        for whole in (DensePattern(), NeighborhoodPattern((-1, -1, -1)), BlockTopK(1.0)):
            plain = genattn.attention(*inputs, whole, LAYOUT)
            assert torch.equal(genattn.attention(*inputs, whole.with_measured_tail(), LAYOUT), plain)
            assert not any(type(whole).__name__ in r.getMessage() for r in caplog.records), "nobody named a tail"
            for kind in TAILS:
                assert torch.equal(genattn.attention(*inputs, whole.with_tail(kind), LAYOUT), plain)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 3
    assert all("has no effect" in message and "visits every key tile" in message for message in said)


def test_heads_may_differ_in_having_one():
    with_tail = dataclasses.replace(WINDOW, tail="mean")
    pattern = PerHead((with_tail, WINDOW.with_tail(None)), (0, 1))
    inputs = _inputs()
    out = genattn.attention(*inputs, pattern, LAYOUT)
    for head, one in enumerate((with_tail, WINDOW)):
        alone = genattn.attention(*(x[:, :, head : head + 1] for x in inputs), one, LAYOUT)
        torch.testing.assert_close(out[:, :, head : head + 1], alone, atol=1e-5, rtol=1e-4)
    assert pattern.for_heads(1, 1).tail_of_heads() == (None,)


def test_layers_may_differ():
    pattern = PerLayer((dataclasses.replace(WINDOW, tail="mean2"), WINDOW), (0, 1))
    assert [pattern.for_layer(n, 2).tail for n in range(2)] == ["mean2", "auto"]
    everywhere = PerLayer((WINDOW, Union(WINDOW, RADIAL)), (0, 1), tail="mean")
    assert [everywhere.for_layer(n, 2).tail for n in range(2)] == ["mean", "mean"]
    for combined in (Union(RADIAL, WINDOW, tail="mean"), PerHead((RADIAL,), (0, 0), tail="mean")):
        assert combined.for_layer(0, 1).tail == "mean"
        assert combined.for_heads(0, 1).tail == "mean"


def test_files_keep_it():
    for name, pattern in EVERY.items():
        assert pattern_from_dict(pattern_to_dict(pattern)) == pattern, name
    assert "tail" not in pattern_to_dict(RadialPattern())
    assert pattern_to_dict(RadialPattern(tail=None))["tail"] is None
    assert set(TYPES) >= {"RadialPattern", "PerLayer"}


def test_parts_of_one_kind_only():
    pattern = PerHead((WINDOW.with_tail("mean"), RADIAL.with_tail("mean2")))
    with pytest.raises(GenAttnError, match="heads must share one kind of tail or have None, got mean, mean2"):
        pattern.plan(LAYOUT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RadialPattern(tail="median"),
        lambda: NeighborhoodPattern(3, tail="median"),
        lambda: BlockTopK(tail="median"),
        lambda: DensePattern(tail="median"),
        lambda: Union(RADIAL, tail="median"),
        lambda: GlobalTokens(RADIAL, frames=(0,), tail="median"),
        lambda: PerLayer((RADIAL,), tail="median"),
        lambda: pattern_from_dict({"type": "RadialPattern", "tail": "median"}),
    ],
)
def test_unknown_names_are_listed(make):
    with pytest.raises(GenAttnError, match="tail must be None or one of auto, mean, mean2, got 'median'"):
        make()


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Union(p, RADIAL), lambda p: GlobalTokens(p, frames=(0,))])
def test_causal_keys_stay_hidden(wrap):
    causal = NeighborhoodPattern((3, 4, 4), is_causal=(True, False, False))
    assert wrap(causal).with_measured_tail().tail_of_heads() is None
    assert wrap(causal).measured_tail is None
    with pytest.raises(GenAttnError, match="a causal axis hides them on purpose; use tail=None"):
        wrap(causal).with_tail("mean")


@pytest.mark.parametrize("impl", ["halo", "natten"])
def test_backends_without_tiles_refuse_it(impl):
    layout = TokenLayout.from_grid((6, 8, 8))
    inputs = [x[:, :384] for x in _inputs()]
    with pytest.raises(GenAttnError, match="tail='mean'.*use tail=None"):
        genattn.attention(*inputs, WINDOW.with_tail("mean"), layout, impl=impl)


def test_with_a_tail_visited_tiles_are_seen_whole():
    """What a tile hides costs as much as what it shows; heads without a tail keep the rule, and nobody sees padding."""
    layout = TokenLayout((*LAYOUT.segments, genattn.geometry.token_layout.Segment("padding", (20,))))
    plain, tailed = (WINDOW.with_tail(kind).plan(layout, 16, 16) for kind in (None, "mean"))
    assert plain.full_share < 1
    assert tailed.full_share == 1
    assert torch.equal(tailed.columns, plain.columns)
    visible = visible_mask(tailed)[0]
    assert not visible[:, layout.raster_index == -2].any()
    assert (visible | ~visible_mask(plain)[0]).all()
    mixed = PerHead((WINDOW.with_tail("mean"), WINDOW), (0, 1)).plan(layout, 16, 16)
    assert torch.equal(visible_mask(mixed)[1], visible_mask(plain)[0])
    assert torch.equal(visible_mask(mixed)[0], visible)


def test_a_combination_without_a_tail_is_not_given_its_parts():
    part = WINDOW.with_tail("mean")
    for combined in (Union(part, part, tail=None), GlobalTokens(part, frames=(0,), tail=None)):
        plan = combined.plan(LAYOUT, 16, 16)
        assert plan.tail is None
        assert torch.equal(visible_mask(plan)[0], combined.mask(LAYOUT))


def test_clusters_stand_in_for_their_own_heads_keys():
    """Each head alone, through the folded plan of all heads."""
    inputs = _smooth()
    plan = plan_for(inputs[0], inputs[1], EVERY["clusters"], LAYOUT)
    folded = plan.folded
    assert folded.tail is not None
    heads = torch.where(folded.tail.tokens.amax(1) >= 0, folded.tail.tokens.amax(1) % 2, -1)
    own = folded.query_tiles.amax(1) % 2
    seen = folded.tail.stands_in()[0]
    assert not seen[own[:, None] != heads].any()
    assert plan.with_tail(None).tail is None
    with pytest.raises(ValueError, match="have a tail in all heads or in none"):
        plan.with_tail("mean", (True, False))
    out = genattn.attention(*inputs, EVERY["clusters"], LAYOUT)
    inputs[1][:, :, 1] += 100.0
    moved = plan.unfold(reference_attention(*(plan.fold(x) for x in inputs), folded)[0])
    torch.testing.assert_close(moved[:, :, 0], out[:, :, 0], atol=1e-5, rtol=1e-4)
