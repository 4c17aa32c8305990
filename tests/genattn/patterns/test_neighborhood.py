"""Generalized neighborhood attention: NATTEN's own masks, plans against the rule, tiles and bad settings."""

import base64
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from layout_draws import layouts
from neighborhood_draws import settings_for
from plan_checks import assert_plan_is_exact

from genattn.errors import GenAttnError
from genattn.geometry.tile_choice import fixed_cuts, is_mask_free
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.special_cases import blocked, dilated_window, sliding_tile, sliding_window

CASES = json.loads((Path(__file__).parent / "gna_masks.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_masks_of_natten(case: dict[str, object]) -> None:
    """Ten masks computed by NATTEN itself, and our plans on them."""
    layout = TokenLayout.from_grid(case["token_layout"])  # type: ignore[arg-type]
    pattern = NeighborhoodPattern(*(tuple(case[k]) for k in ("window_size", "stride", "dilation", "is_causal")))  # type: ignore[call-overload]
    n = layout.seqlen
    packed = np.frombuffer(base64.b64decode(str(case["packbits_b64"])), dtype=np.uint8)
    expected = torch.from_numpy(np.unpackbits(packed)[: n * n].reshape(n, n).astype(bool))
    assert hashlib.sha256(packed.tobytes()).hexdigest() == case["sha256"]
    mask = pattern.mask(layout)
    assert torch.equal(mask, expected)
    assert int(mask.sum()) == case["nnz"]
    for tile in ("auto", "frames", "runs"):
        for block in (4, 16, 64):
            assert_plan_is_exact(
                replace(pattern, tile=tile).plan(layout, block, block), expected, torch.zeros(n, dtype=torch.bool)
            )


@given(st.data(), layouts(), st.sampled_from([1, 4, 8, 16, 33]), st.sampled_from([None, 2, 5, 16]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_plan_is_the_rule_seen_from_tiles(data: st.DataObject, layout: TokenLayout, block_q: int, block_k: int | None) -> None:
    pattern = data.draw(settings_for(layout))
    mask = pattern.mask(layout)
    assert_plan_is_exact(pattern.plan(layout, block_q, block_k or block_q), mask, layout.raster_index == -2)
    # the mask is the product of the axes' masks over the grid, and everything else is global
    places, product = layout.grid_positions, np.ones((1, 1), dtype=bool)
    for axis in pattern.axes(layout):
        product = np.kron(product, axis.mask())
    assert torch.equal(mask[places][:, places], torch.from_numpy(product))
    text = layout.raster_index == -1
    assert mask[:, text].all()
    assert mask[text][:, layout.raster_index != -2].all()


@given(st.data(), st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_tile_of_the_users_own(data: st.DataObject, grid: tuple[int, int, int]) -> None:
    layout = TokenLayout.from_grid(grid, text_after=3)
    tile = tuple(data.draw(st.integers(1, n)) for n in grid)
    pattern = replace(data.draw(settings_for(layout)), tile=tile)
    block = math.prod(tile)
    assert_plan_is_exact(pattern.plan(layout, block, block), pattern.mask(layout), layout.raster_index == -2)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "speedup", "mask_free"),
    [
        ((21, 45, 80), (9, 25, 40), (3, 5, 8), (3, 5, 8), 7.38, 1.0),
        ((21, 45, 80), (10, 24, 40), (2, 8, 8), (2, 8, 8), 6.01, 0.85),
        ((33, 45, 80), (15, 25, 24), (3, 5, 8), (3, 5, 8), 11.6, 1.0),
        ((30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), 11.11, 1.0),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11, 1.0),
    ],
)
def test_tiles_chosen_for_ragged_grids(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    tile: tuple[int, ...],
    speedup: float,
    mask_free: float,
) -> None:
    """Work of the whole plan, unused lanes included, against dense attention without padding."""
    layout = TokenLayout.from_grid(grid)
    pattern = NeighborhoodPattern(window, stride)
    plan = pattern.plan(layout)
    assert tuple(cut.lanes for cut in pattern.cuts(layout, 128, 128)[0]) == tile
    assert 1 / plan.computed_density == pytest.approx(speedup, abs=0.06)
    assert plan.full_share == pytest.approx(mask_free, abs=0.01)


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (33, 45, 80), (48, 85)])
def test_padding_stays_inside_the_tile(grid: tuple[int, ...]) -> None:
    """No tensor is padded: every token once, lanes fill at least three quarters of the tiles."""
    plan = NeighborhoodPattern(tuple(n // 3 for n in grid)).plan(TokenLayout.from_grid(grid))
    used = plan.query_tiles[plan.query_tiles >= 0]
    assert used.numel() == math.prod(grid) == used.unique().numel()
    assert used.numel() > 0.75 * plan.query_tiles.numel()


def test_boxes_beat_runs() -> None:
    layout, pattern = TokenLayout.from_grid((21, 30, 52)), NeighborhoodPattern((9, 12, 16))
    assert pattern.plan(layout).computed_density < 0.7 * replace(pattern, tile="runs").plan(layout).computed_density


def test_parity_rule_has_no_false_positive() -> None:
    for tile in (1, 2, 3, 4, 8):
        for parts in range(1, 7):
            length = tile * parts
            layout = TokenLayout.from_grid((length,))
            for window in range(1, length + 1):
                for stride in range(1, window + 1):
                    if is_mask_free(length, tile, window, stride):
                        pattern = NeighborhoodPattern((window,), (stride,), tile=(tile,))
                        assert pattern.plan(layout, tile, tile).full_share == 1.0, (length, tile, window, stride)


def test_named_cases() -> None:
    layout = TokenLayout.from_grid((12, 16))
    block = blocked((4, 8)).mask(layout)
    index = torch.arange(layout.seqlen)
    home = index // 16 // 4 * 2 + index % 16 // 8
    assert torch.equal(block, home[:, None] == home[None])
    assert torch.equal(blocked((-1, -1)).mask(layout), torch.ones(192, 192, dtype=torch.bool))
    tile = sliding_tile((4, 4), (3, 1))
    assert tile.plan(layout, 16, 16).full_share == 1.0
    assert tile.mask(layout).float().mean() == pytest.approx(1 / 4)
    assert dilated_window((3, 3), 4).mask(layout)[0].nonzero().flatten().tolist() == [
        16 * y + x for y in (0, 4, 8) for x in (0, 4, 8)
    ]
    assert sliding_window((3, 5)).mask(layout).sum(1).unique().tolist() == [15]
    assert sliding_window(3, is_causal=True).mask(TokenLayout.from_grid((4,))).sum(1).tolist() == [1, 2, 3, 3]
    with pytest.raises(GenAttnError, match=r"odd number of tiles .* try \(3, 1\)"):
        sliding_tile((4, 4), (4, 1))


def test_axes_of_one_token_and_left_out_axes() -> None:
    image, video = TokenLayout.from_grid((6, 8)), TokenLayout.from_grid((1, 6, 8))
    expected = NeighborhoodPattern((3, 5)).mask(image)
    assert torch.equal(NeighborhoodPattern((3, 5)).mask(video), expected)
    assert torch.equal(NeighborhoodPattern((1, 3, 5)).mask(image), expected)
    assert torch.equal(NeighborhoodPattern((-1, 3, 5)).mask(video), expected)
    scalar = NeighborhoodPattern(3, stride=2, dilation=2)
    assert torch.equal(scalar.mask(video), scalar.mask(image))
    assert NeighborhoodPattern(1).mask(image).equal(torch.eye(48, dtype=torch.bool))


def test_settings_made_for_another_grid() -> None:
    """The published schedules for (T, 44, 80) grow and shrink with the picture."""
    pattern = NeighborhoodPattern((-1, 12, 24), stride=(1, 4, 8), base_size=(-1, 44, 80))
    assert [a.window for a in pattern.axes(TokenLayout.from_grid((16, 44, 80)))] == [16, 12, 24]
    half = pattern.axes(TokenLayout.from_grid((21, 22, 40)))
    assert [(a.window, a.stride) for a in half] == [(21, 1), (6, 2), (12, 4)]
    tiny = pattern.axes(TokenLayout.from_grid((1, 2, 2)))
    assert [(a.window, a.stride) for a in tiny] == [(1, 1), (1, 1), (1, 1)]
    wide = NeighborhoodPattern((-1, 4, 16), dilation=(1, 11, 5), base_size=(-1, 44, 80)).axes(
        TokenLayout.from_grid((4, 30, 52))
    )
    assert [(a.window, a.dilation) for a in wide] == [(4, 1), (3, 8), (10, 3)]


def test_circular_windows_wrap_and_have_no_border() -> None:
    layout = TokenLayout.from_grid((2, 3, 8), text_before=2)
    pattern = NeighborhoodPattern((2, 3, 3), circular=(False, False, True))
    row = pattern.mask(layout)[2, 2:].view(2, 3, 8)
    assert row[0, 0].nonzero().flatten().tolist() == [0, 1, 7]
    turned = layout.grid_positions.view(2, 3, 8).roll(3, dims=2).flatten()
    mask = pattern.mask(layout)[2:, 2:]
    assert torch.equal(mask, mask[turned - 2][:, turned - 2])


def test_text_only_layout_is_dense() -> None:
    layout = TokenLayout((Segment("text", (6,)), Segment("padding", (2,))))
    assert_plan_is_exact(
        NeighborhoodPattern(3).plan(layout, 4, 4), NeighborhoodPattern(3).mask(layout), layout.raster_index == -2
    )


VIDEO = TokenLayout.from_grid((5, 8, 10))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"window_size": (0, 2, 2)}, "window_size must be >= 1 on every axis, got (0, 2, 2); use -1 for the full axis"),
        ({"window_size": -2}, "window_size must be >= 1"),
        ({"window_size": 3, "stride": 0}, "stride must be >= 1"),
        ({"window_size": 3, "dilation": (1, 0, 1)}, "dilation must be >= 1"),
        ({"window_size": 2.5}, "window_size must be an integer"),
        ({"window_size": "3"}, "window_size must be an integer"),
        ({"window_size": True}, "window_size must be an integer"),
        ({"window_size": 3, "is_causal": 1}, "is_causal must be True or False"),
        ({"window_size": 3, "circular": "no"}, "circular must be True or False"),
        ({"window_size": (3, 3), "stride": (1, 1, 1)}, "the same 1 to 3 axes"),
        ({"window_size": (3, 3, 3, 3)}, "the same 1 to 3 axes"),
        ({"window_size": 3, "base_size": 40}, "base_size must give a size >= 1 per axis, got 40; -1 keeps"),
        ({"window_size": 3, "base_size": (1, 0, 2)}, "base_size must give"),
        ({"window_size": 3, "tile": "boxes"}, "tile must be an integer"),
        ({"window_size": 3, "tile": (1, -1, 2)}, "tile must give a size >= 1 per axis"),
    ],
)
def test_bad_settings(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(GenAttnError) as error:
        NeighborhoodPattern(**arguments)  # type: ignore[arg-type]
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"window_size": (6, 2, 2)},
            "on the frames axis of 5, got 6 * 1; nearest legal window_size: 5 (or -1 for the full axis)",
        ),
        ({"window_size": (2, 2, 4), "stride": (1, 1, 5)}, "on the width axis of 10, got 5; nearest legal value: 4"),
        ({"window_size": (2, 3, 2), "dilation": (1, 3, 1)}, "on the height axis of 8, got 3 * 3; nearest legal window_size: 2"),
        (
            {"window_size": (4, 4)},
            "settings for 2 axes do not fit a grid of 5x8x10; give one value per axis (frames, height, width)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_grid(arguments: dict[str, object], says: str) -> None:
    for call in ("mask", "plan", "check"):
        with pytest.raises(GenAttnError) as error:
            getattr(NeighborhoodPattern(**arguments), call)(VIDEO)  # type: ignore[arg-type]
        assert says in str(error.value)


def test_tiles_that_do_not_fit() -> None:
    with pytest.raises(GenAttnError, match="holds 256 tokens, but a block has 128 lanes"):
        NeighborhoodPattern(3, tile=(4, 8, 8)).plan(VIDEO)
    with pytest.raises(GenAttnError, match="between 1 and 5 on the frames axis, got 6"):
        NeighborhoodPattern(3, tile=(6, 2, 2)).plan(VIDEO)
    axes = NeighborhoodPattern(3).axes(VIDEO)
    assert [cut.parts for cut in fixed_cuts(axes, (2, 8, 8), 128)] == [3, 1, 2]


@pytest.mark.parametrize("grid", [(6, 8, 8), (5, 3, 7), (9, 2, 2), (1, 12, 12)])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 8)])
def test_tiles_of_frames_hold_tokens_of_one_frame(grid: tuple[int, int, int], blocks: tuple[int, int]) -> None:
    layout = TokenLayout.from_grid(grid)
    pattern = NeighborhoodPattern(tuple(min(3, n) for n in grid), tile="frames")
    plan = pattern.plan(layout, *blocks)
    places = grid[1] * grid[2]
    for tiles, block in zip((plan.query_tiles, plan.key_tiles), blocks, strict=True):
        frame = torch.where(tiles >= 0, layout.raster_index[tiles.clamp_min(0).long()] // places, -1)
        first = frame.amax(1, keepdim=True)
        assert bool(((frame == first) | (frame < 0)).all())
        # boxes fill their block as far as a frame has tokens
        assert int((tiles >= 0).sum(1).amax()) > min(block, places) // 2
