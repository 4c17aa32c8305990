"""Decayed logits under a pattern: dense attention by the rule for single tokens, plans tile pair by tile pair."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn.errors import GenAttnError
from genattn.geometry.frame_decay import FrameDecay, decayed
from genattn.geometry.tiles import run_raster
from genattn.kernels.reference.attention import reference_attention, tile_states
from genattn.patterns import logit_decayed
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import pattern_from_dict, pattern_to_dict
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.pattern import forget_plans
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.selection.rules import TopK
from genattn.selection.tiling import Boxes, Clusters

WINDOW = genattn.NeighborhoodPattern((5, 3, 3))


def outside_tokens(layout, trained):
    """Bool [S, S], from the definition: both on the grid, and the key's frame not among the nearest to the query's."""
    index, (frames, height, width) = layout.raster_index, layout.grid3
    frame = torch.where(index >= 0, index // (height * width), -1)
    first = (frame - trained // 2).clamp(0, max(0, frames - trained))
    apart = (frame[None] < first[:, None]) | (frame[None] >= first[:, None] + trained)
    return apart & (frame[None] >= 0) & (frame[:, None] >= 0)


def tokens(layout, heads=2, dim=8, batch=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, layout.seqlen, heads, dim, generator=draw, dtype=torch.float64) for _ in range(3)]


@settings(deadline=None, max_examples=25)
@given(
    grid=st.tuples(st.integers(3, 9), st.integers(1, 4), st.integers(1, 5)),
    text=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    trained=st.integers(2, 6),
    numbers=st.sampled_from([(0.9, 0.0), (1.0, 1.5), (0.0, 0.0), (0.5, 0.7), (0.8, math.inf)]),
    blocks=st.sampled_from([(4, 4), (16, 8), (7, 32)]),
)
def test_over_a_dense_pattern_it_is_the_rule_for_single_tokens(grid, text, trained, numbers, blocks):
    layout = genattn.TokenLayout.from_grid(grid, text_before=text[0], text_after=text[1])
    query, key, value = tokens(layout)
    pattern = LogitDecayed(genattn.DensePattern(), trained, *numbers)
    out, lse = reference_attention(query, key, value, pattern.plan(layout, *blocks))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    lowered = logits * numbers[0] - numbers[1]
    logits = torch.where(outside_tokens(layout, trained), lowered, logits) if grid[0] > trained else logits
    torch.testing.assert_close(out, (logits.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(lse, logits.logsumexp(-1).transpose(1, 2))


@pytest.mark.parametrize("blocks", [(16, 16), (8, 24)])
def test_over_windows_it_is_the_rule_for_single_tokens(blocks):
    """Windows choose their tiles themselves; under a decay they keep to frames."""
    layout = genattn.TokenLayout.from_grid((8, 4, 5), text_before=2, text_after=3)
    query, key, value = tokens(layout)
    plan = LogitDecayed(WINDOW, 3, 0.5, 0.7).plan(layout, *blocks)
    out, lse = reference_attention(query, key, value, plan)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    apart = outside_tokens(layout, 3)
    assert bool((apart & WINDOW.mask(layout)).any())
    logits = torch.where(apart, 0.5 * logits - 0.7, logits).masked_fill(~WINDOW.mask(layout), -torch.inf)
    torch.testing.assert_close(out, (logits.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(lse, logits.logsumexp(-1).transpose(1, 2))
    short = genattn.TokenLayout.from_grid((3, 4, 5))
    near = genattn.NeighborhoodPattern((3, 3, 3))
    assert torch.equal(LogitDecayed(near, 3).plan(short, *blocks).key_tiles, near.plan(short, *blocks).key_tiles)


def check_pairs(plan, layout, trained, heads=1):
    """Outside are just the tile pairs of which every token pair is."""
    apart = outside_tokens(layout, trained)
    table = torch.zeros(len(plan.query_tiles), len(plan.key_tiles)) if plan.fade is None else plan.fade.table()
    for i, queries in enumerate(plan.query_tiles):
        for j, keys in enumerate(plan.key_tiles):
            rows, columns = (x[x >= 0].long() // heads for x in (queries, keys))
            assert bool(table[i, j]) == bool(apart[rows][:, columns].all()), (i, j)
    return int(table.sum())


@pytest.mark.parametrize("blocks", [(16, 16), (8, 24)])
@pytest.mark.parametrize(
    "inner",
    [
        genattn.RadialPattern(decay=0.3),
        genattn.NeighborhoodPattern((5, 3, 3), tile=(2, 2, 2), tail="mean2"),
        genattn.DensePattern(),
        Union(genattn.RadialPattern(decay=0.3), GlobalTokens(WINDOW, frames=(0,))),
        PerHead((WINDOW, genattn.RadialPattern(decay=0.3)), (0, 1)),
        RotatingAnchors(WINDOW, stride=3),
    ],
    ids=lambda p: type(p).__name__,
)
def test_tile_pairs_are_outside_when_all_their_tokens_are(inner, blocks):
    layout = genattn.TokenLayout.from_grid((7, 4, 5), text_before=2, text_after=3)
    plan, plain = (p.plan(layout, *blocks) for p in (LogitDecayed(inner, 3, 0.5), inner))
    assert check_pairs(plan, layout, 3)
    if not isinstance(inner, genattn.DensePattern):  # its tiles keep to frames
        assert torch.equal(plan.columns, plain.columns)
        assert (plan.tail is None) == (plain.tail is None)


@pytest.mark.parametrize("tiles", [Boxes(), Clusters(6, 6)])
def test_a_pattern_that_chooses_by_content_is_decayed_in_what_it_chose(tiles):
    layout = genattn.TokenLayout.from_grid((8, 4, 4), text_after=4)
    inner = AdaptivePattern(TopK(0.5), tiles=tiles)
    query, key, value = (x.float() for x in tokens(layout, dim=16))
    plan = LogitDecayed(inner, 3, 0.5).plan_for(query, key, layout, 16, 16)
    plain = inner.plan_for(query, key, layout, 16, 16)
    folded, heads = (plan.folded, plan.heads) if hasattr(plan, "folded") else (plan, 1)
    if heads > 1:
        ends = [folded.fade.window, folded.fade.span]
        assert all(len(e) == len(t) for e, t in zip(ends, (folded.query_tiles, folded.key_tiles)))
        apart = outside_tokens(layout, 3)
        table = folded.fade.table()
        for i, j in ((i, j) for i in range(len(folded.query_tiles)) for j in range(len(folded.key_tiles))):
            rows, columns = (x[x >= 0].long() // heads for x in (folded.query_tiles[i], folded.key_tiles[j]))
            assert not table[i, j] or apart[rows][:, columns].all()
    else:
        assert check_pairs(folded, layout, 3)
        assert torch.equal(plan.columns, plain.columns)
    out = genattn.attention(query, key, value, LogitDecayed(inner, 3, 0.5), layout)
    assert out.isfinite().all()


def test_straddling_tiles_are_inside_with_either_frame():
    """Runs of 8 over frames of 6: the window of a tile that holds two frames is that of both."""
    layout = genattn.TokenLayout.from_grid((6, 2, 3))
    tiles = torch.from_numpy(run_raster(36, 8)).int()
    plan = genattn.DensePattern().plan(layout, 8, 8)
    assert torch.equal(plan.query_tiles, tiles)
    assert check_pairs(decayed(plan, layout, FrameDecay(2, 0.5)), layout, 2)


def test_an_infinite_penalty_visits_no_frame_outside():
    layout = genattn.TokenLayout.from_grid((7, 4, 4))
    pattern = LogitDecayed(genattn.RadialPattern(decay=0.3, tail="mean"), 3, 1.0, math.inf)
    plan, inner = pattern.plan(layout, 16, 16), pattern.pattern.plan(layout, 16, 16)
    assert plan.fade is None
    frame = torch.arange(7)
    near = ~outside_tokens(layout, 3)[frame * 16][:, frame * 16]
    assert torch.equal(tile_states(plan)[0] > 0, (tile_states(inner)[0] > 0) & near)
    assert torch.equal(plan.tail.stands_in()[0], inner.tail.stands_in()[0] & near)


def test_a_clip_no_longer_than_trained_is_untouched_and_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logit_decayed, "_SAID", set())
    layout = genattn.TokenLayout.from_grid((3, 4, 4))
    pattern = LogitDecayed(genattn.RadialPattern(), 3)
    with caplog.at_level(logging.WARNING, "genattn"):
        plan = pattern.plan(layout, 16, 16)
        pattern.plan(layout, 16, 32)
    assert plan.fade is None
    assert torch.equal(plan.columns, pattern.pattern.plan(layout, 16, 16).columns)
    assert [r.getMessage() for r in caplog.records] == [
        "LogitDecayed has no effect: a clip of 3 latent frames is no longer than trained (3)"
    ]
    assert LogitDecayed(genattn.RadialPattern(), 2).plan(genattn.TokenLayout.from_grid((1, 6, 6)), 16, 16).fade is None


def test_tiles_as_long_as_the_clip_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logit_decayed, "_SAID", set())
    layout = genattn.TokenLayout.from_grid((6, 2, 2))
    deep = genattn.NeighborhoodPattern((3, 1, 1), tile=(6, 1, 1))
    with caplog.at_level(logging.WARNING, "genattn"):
        for numbers in ((0.5, 0.0), (0.6, 0.0)):
            plan = LogitDecayed(deep, 3, *numbers).plan(layout, 8, 8)
            assert plan.fade is None
    assert [r.getMessage() for r in caplog.records] == [
        "LogitDecayed has no effect: every tile reaches into the trained window of every other; "
        "give the pattern tiles of one frame (tile='frames')"
    ]


def test_it_follows_layers_steps_heads_and_tails():
    layers = PerLayer((WINDOW, LogitDecayed(WINDOW, 3)))
    assert layers.for_layer(1, 2) == LogitDecayed(WINDOW, 3)
    assert LogitDecayed(layers.patterns[0], 3).for_layer(0, 2).pattern == WINDOW
    moving = LogitDecayed(RotatingAnchors(WINDOW, stride=3), 3)
    assert moving.for_step(1).pattern.offset == 1
    heads = LogitDecayed(genattn.RadialPattern(decay=(0.2, 0.4)), 3)
    assert heads.for_heads(1, 1).pattern.decays == (0.4,)
    assert LogitDecayed(WINDOW, 3).with_measured_tail().tail_of_heads() == WINDOW.measured_tail
    layout = genattn.TokenLayout.from_grid((7, 8, 8))
    assert LogitDecayed(WINDOW, 3, tail="mean2").plan(layout, 16, 16).tail.kind == "mean2"
    assert torch.equal(LogitDecayed(WINDOW, 3).mask(layout), WINDOW.mask(layout))


def test_it_is_saved_and_comes_back():
    pattern = LogitDecayed(genattn.RadialPattern(decay=0.3), 21, 0.8, 0.5)
    told = pattern_to_dict(pattern)
    assert told["pattern"]["type"] == "RadialPattern"
    assert pattern_from_dict(told) == pattern


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Union(p, WINDOW), "Union cannot hold LogitDecayed"),
        (lambda p: Intersection(WINDOW, p), "Intersection cannot hold LogitDecayed"),
        (lambda p: PerHead((p, WINDOW)), "PerHead cannot hold LogitDecayed"),
        (lambda p: GlobalTokens(p, frames=(0,)), "GlobalTokens cannot hold LogitDecayed"),
        (lambda p: RotatingAnchors(p, stride=2), "RotatingAnchors cannot hold LogitDecayed"),
        (lambda p: LogitDecayed(p, 4), "LogitDecayed cannot hold LogitDecayed"),
        (lambda p: LogitDecayed("radial", 4), "needs a pattern"),
        (lambda p: LogitDecayed(WINDOW, 1), "trained_frames must be >= 2"),
        (lambda p: LogitDecayed(WINDOW, 4, 1.5), "decay must be 0 to 1"),
        (lambda p: LogitDecayed(WINDOW, 4, 0.5, -1.0), "penalty must be >= 0"),
        (lambda p: LogitDecayed(WINDOW, 4, 1.0), "change nothing"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(GenAttnError, match=message):
        make(LogitDecayed(WINDOW, 3))


@pytest.mark.parametrize("impl", ["halo", "natten"])
def test_boxes_that_follow_the_query_tile_know_no_decay(impl):
    layout = genattn.TokenLayout.from_grid((7, 4, 4))
    inputs = tokens(layout)
    with pytest.raises(GenAttnError, match="NeighborhoodPattern, got LogitDecayed"):
        genattn.attention(*inputs, LogitDecayed(WINDOW, 3), layout, impl=impl)
    forget_plans({LogitDecayed(WINDOW, 3)})
