"""Radial Attention: the mask's promises over drawn shapes, the plan against the rule, and the published densities."""

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from layout_draws import layouts
from plan_checks import assert_plan_is_exact

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import PlanCache, held_bytes
from genattn.patterns.radial import RadialPattern

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def patterns(draw: st.DrawFn, heads: bool = True) -> RadialPattern:
    variant = draw(st.sampled_from(["paper", "official", "genattn"]))
    model = draw(st.sampled_from(["wan", "hunyuan"]))
    one = st.sampled_from([0.05, 0.2, 0.5, 0.95, 1.0, 2.5])
    return RadialPattern(
        variant=variant,
        decay=draw(st.one_of(st.none(), one, st.tuples(one, one, one)) if heads else one),
        window=draw(st.sampled_from(["strip", "box"])) if variant == "genattn" else "strip",
        sink=draw(st.sampled_from([None, True, False])),
        block=draw(st.sampled_from([None, 1, 2, 5, 16])),
        floor=draw(st.sampled_from([0, 1, 2])),
        model=model,
        half_window=draw(st.booleans()) if (variant, model) == ("official", "wan") else False,
    )


@given(patterns(), layouts(), st.sampled_from([1, 3, 4, 8, 16, 33]), st.sampled_from([None, 2, 5, 16]))
@QUICK
def test_plan_is_the_rule_seen_from_tiles(
    pattern: RadialPattern, layout: TokenLayout, block_q: int, block_k: int | None
) -> None:
    plan = pattern.plan(layout, block_q, block_k or block_q)
    assert_plan_is_exact(plan, pattern.mask(layout), layout.raster_index == -2)


def _reference_mask(pattern: RadialPattern, frames: int, tokens: int) -> torch.Tensor:
    """Eq. 4 of the paper, written as it stands."""
    index = torch.arange(frames * tokens)
    frame, place = index // tokens, index % tokens
    d = (frame[:, None] - frame[None]).abs()
    apart = (place[:, None] - place[None]).abs()
    r = torch.tensor([math.floor(math.log2(max(int(n), 1))) for n in d.flatten()]).view_as(d)
    window = (2**r <= tokens) & (apart + 1 <= tokens / 2.0**r)
    point = (d % torch.ceil(2**r / tokens).long() == 0) & (apart == 0)
    return window | point | ((frame == 0)[None] & pattern.has_sink)


@pytest.mark.parametrize("grid", [(9, 2, 3), (40, 1, 5), (33, 4, 4), (70, 1, 2), (20, 1), (6,), (1, 5, 5)])
@pytest.mark.parametrize("sink", [True, False])
def test_paper_is_equation_4(grid: tuple[int, ...], sink: bool) -> None:
    pattern, layout = RadialPattern(variant="paper", sink=sink), TokenLayout.from_grid(grid)
    frames, height, width = layout.grid3
    assert torch.equal(pattern.mask(layout), _reference_mask(pattern, frames, height * width))


@given(patterns(heads=False), layouts())
@QUICK
def test_promises_of_every_mask(pattern: RadialPattern, layout: TokenLayout) -> None:
    """No query without keys; own frame and position; same position in every kept frame; sink; text and padding."""
    if pattern.variant == "official":
        pattern = replace(pattern, variant="genattn", half_window=False)
    mask, index = pattern.mask(layout), layout.raster_index
    padding = index == -2
    assert not mask[:, padding].any()
    if bool(padding.all()):
        return
    assert mask[~padding].any(1).all()
    assert mask[index == -1][:, ~padding].all()
    assert mask[:, index == -1].all()
    frames, height, width = layout.grid3
    grid = mask[layout.grid_positions][:, layout.grid_positions].view(frames, height * width, frames, height * width)
    assert grid.diagonal(dim1=0, dim2=2).all(), "own frame"
    kept = grid.any(1).any(2)
    same = grid.diagonal(dim1=1, dim2=3).all(-1)
    assert torch.equal(kept, same), "same position in every kept frame"
    if pattern.has_sink:
        assert grid[:, :, 0].all()


@given(patterns(heads=False), layouts(), st.floats(0.05, 3.0), st.floats(1.0, 4.0))
@QUICK
def test_density_grows_with_decay(pattern: RadialPattern, layout: TokenLayout, decay: float, factor: float) -> None:
    narrow, wide = replace(pattern, decay=decay), replace(pattern, decay=decay * factor)
    less, more = narrow.mask(layout), wide.mask(layout)
    if pattern.variant == "official":
        assert less.sum() <= more.sum()
    else:
        assert not (less & ~more).any()


@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 24), st.sampled_from(["paper", "genattn"]))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_kept_frames_at_thousands_of_shapes(frames: int, height: int, width: int, variant: str) -> None:
    """Frames one apart are whole, each band shows the query's own place, and every whole band keeps a frame."""
    rule = RadialPattern(variant=variant, sink=False).rule(TokenLayout.from_grid((frames, height, width)))
    classes, tokens = rule.frame_class[0], height * width
    assert (classes.diagonal() == 0).all()
    assert (classes.diagonal(1) == 0).all()
    place = torch.arange(tokens)
    assert (rule.low[0, :, 1, :tokens] <= place).all()
    assert (rule.low[0, :, 1, :tokens] + rule.width[0, :, 1, :tokens] > place).all()
    for band in range(1, frames.bit_length() - 1):
        assert (classes[0, 2**band : 2 ** (band + 1)] >= 0).any(), f"no frame is kept in band {band}"


@pytest.mark.parametrize("tokens", [1023, 1024, 2047, 2048, 3839, 3840])
def test_no_jump_at_powers_of_two(tokens: int) -> None:
    """The official window doubles from 2047 to 2048 tokens a frame; ours moves by less than a tile."""
    for neighbour in (tokens - 1, tokens + 1):
        ours = [RadialPattern(decay=1.0).plan(TokenLayout.from_grid((21, 1, n))).density for n in (tokens, neighbour)]
        assert abs(ours[0] - ours[1]) < 0.05 * ours[0]


def test_tiles_of_the_pattern_need_no_mask() -> None:
    """At its own block size, and at half of it, every visited tile is full."""
    for grid in [(21, 45, 80), (21, 30, 52), (33, 45, 80), (9, 44, 80)]:
        for window in ("strip", "box"):
            for block in (128, 64):
                plan = RadialPattern(window=window).plan(TokenLayout.from_grid(grid, text_after=77), block, block)
                assert plan.full_share == 1.0
                assert plan.rule is None


def test_plan_of_509_frames_is_quick_and_small() -> None:
    layout = TokenLayout.from_grid((128, 45, 80))
    RadialPattern().build_plan(TokenLayout.from_grid((4, 45, 80)), 128, 128)
    start = time.process_time()
    plan = RadialPattern().build_plan(layout, 128, 128)
    assert time.process_time() - start < 5.0
    size = sum(t.numel() * t.element_size() for t in (plan.query_tiles, plan.row_ptr, plan.columns, plan.num_full))
    assert size < layout.seqlen**2 / 10_000
    assert 0.05 < plan.density < 0.2


def test_per_head_and_per_layer_decay() -> None:
    layout = TokenLayout.from_grid((9, 6, 10), text_before=5)
    values = (0.2, 1.0, 0.5)
    pattern = RadialPattern(decay=values, block=4)
    singles = [RadialPattern(decay=d, block=4) for d in values]
    assert torch.equal(pattern.mask(layout), torch.stack([p.mask(layout) for p in singles]))
    assert pattern.plan(layout, 16, 16).num_heads == 3
    layered = RadialPattern(layer_decay=(0.2, values), block=4)
    assert layered.for_layer(0, 2) == singles[0]
    assert layered.for_layer(1, 2) == pattern
    assert pattern.for_layer(5, 9) is pattern
    with pytest.raises(GenAttnError, match="one value per layer"):
        layered.for_layer(0, 3)
    with pytest.raises(GenAttnError, match="for_layer"):
        layered.plan(layout)


def test_cache_is_keyed_by_everything() -> None:
    layouts_ = [
        TokenLayout.from_grid((5, 6, 8)),
        TokenLayout.from_grid((5, 8, 6)),
        TokenLayout.from_grid((5, 6, 8), text_after=3),
    ]
    patterns_ = [
        RadialPattern(block=8),
        RadialPattern(block=8, decay=0.2),
        RadialPattern(block=8, window="box"),
        RadialPattern(variant="official", block=8),
        RadialPattern(variant="official", block=8, model="hunyuan"),
        DensePattern(),
    ]
    plans = [p.plan(x, q, k) for p in patterns_ for x in layouts_ for q, k in ((16, 16), (16, 8))]
    assert len({id(p) for p in plans}) == len(plans)
    assert patterns_[0].plan(layouts_[0], 16, 8) is RadialPattern(block=8).plan(TokenLayout.from_grid((5, 6, 8)), 16, 8)


def test_cache_is_bounded_by_bytes() -> None:
    plans = [RadialPattern(block=8).build_plan(TokenLayout.from_grid((n, 6, 8)), 16, 16) for n in (3, 4, 5)]
    sizes = [held_bytes(plan) for plan in plans]
    assert all(size >= 4 * (p.columns.numel() + p.key_tiles.numel()) for p, size in zip(plans, sizes)), "its lists at least"
    cache = PlanCache(sizes[1] + sizes[2])
    for name, plan in zip("abc", plans):
        cache.put(name, plan)
    assert len(cache) == 2
    assert cache.get("a") is None
    assert cache.get("b") is plans[1]
    cache.put("d", plans[0])
    assert cache.get("c") is None, "b was used more recently"
    cache.put("d", plans[0])
    assert len(cache) == 2
    cache.max_bytes = 0
    cache.put("e", plans[2])
    assert len(cache) == 1
    assert cache.get("e") is plans[2]


def test_text_only_and_padding() -> None:
    text = TokenLayout((Segment("text", (9,)), Segment("padding", (4,))))
    for pattern in (RadialPattern(), RadialPattern(variant="official"), DensePattern()):
        mask = pattern.mask(text)
        assert mask[:, :9].all()
        assert not mask[:, 9:].any()
        assert_plan_is_exact(pattern.plan(text, 4, 4), mask, text.raster_index == -2)


@given(layouts(), st.sampled_from([1, 4, 16]), st.sampled_from([1, 4, 16]))
@QUICK
def test_dense_plan(layout: TokenLayout, block_q: int, block_k: int) -> None:
    plan = DensePattern().plan(layout, block_q, block_k)
    assert_plan_is_exact(plan, DensePattern().mask(layout), layout.raster_index == -2)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"variant": "log"}, "variant must be one of paper, official, genattn, got 'log'"),
        ({"window": "ring"}, "window must be one of strip, box"),
        ({"window": "box", "variant": "paper"}, "window='box' needs variant='genattn'"),
        ({"model": "mochi"}, "model must be one of wan, hunyuan"),
        ({"decay": 0}, "decay must be a finite number > 0"),
        ({"decay": -1.0}, "got -1.0"),
        ({"decay": float("nan")}, "decay must be"),
        ({"decay": ()}, "decay must be"),
        ({"decay": (0.5, 0.0)}, "decay must be"),
        ({"decay": "0.5"}, "decay must be"),
        ({"floor": -1}, "floor must be a number of cells >= 0, got -1"),
        ({"floor": 0.5}, "floor must be"),
        ({"block": 0}, "block must be an integer >= 1, got 0"),
        ({"block": 1.5}, "block must be an integer"),
        ({"decay": 1.0, "layer_decay": (1.0,)}, "not both"),
        ({"layer_decay": (1.0, 0.0)}, "decay must be"),
    ],
)
def test_bad_settings(settings_: dict[str, object], says: str) -> None:
    with pytest.raises(GenAttnError, match=says.replace("(", r"\(")):
        RadialPattern(**settings_)  # type: ignore[arg-type]


def test_bad_tiles_and_large_masks() -> None:
    with pytest.raises(GenAttnError, match="block_q must be a number of tokens >= 1"):
        RadialPattern().plan(TokenLayout.from_grid((2, 2, 2)), 0, 4)
    with pytest.raises(GenAttnError, match="at most 16384 tokens, got 16385"):
        RadialPattern().mask(TokenLayout.from_grid((16_385,)))


@pytest.mark.parametrize(("variant", "model"), [("official", "hunyuan"), ("paper", "wan"), ("genattn", "hunyuan")])
def test_a_half_window_that_nobody_released_is_refused(variant: Any, model: Any) -> None:
    with pytest.raises(GenAttnError, match="half_window needs variant='official' and model='wan'"):
        RadialPattern(variant=variant, model=model, half_window=True)
