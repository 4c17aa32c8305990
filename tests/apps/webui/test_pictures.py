"""The app's clickable pictures: a click names the head or token that was drawn there."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genattn.apps.webui.verbs.head_map import cell_size, draw_head_map, head_at, read_heads, toggle_head, write_heads
from genattn.apps.webui.verbs.limits import Limits
from genattn.apps.webui.verbs.masks import FrameSheet, _draw_tiles, clicked_token, mask, preset_shape, read_token
from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.dense import DensePattern
from genattn.planning.show import visible_from


@given(st.dictionaries(st.integers(0, 60), st.integers(1, 48), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_a_click_on_the_map_names_the_head(layers: dict[int, int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(layers) - 1))
    layer = sorted(layers)[row]
    head = data.draw(st.integers(0, layers[layer] - 1))
    picture, cell = draw_head_map(layers, {(layer, head): 1.0}), cell_size(layers)
    x, y = 46 + (head + 0.5) * cell, 26 + (row + 0.5) * cell
    assert head_at(x, y, layers) == (layer, head)
    left_edge = picture.getpixel((46 + head * cell + 1 + 1, int(y)))
    assert left_edge == (217, 119, 6), "the chosen head is framed where a click finds it"


def test_clicks_beside_the_map_are_refused() -> None:
    with pytest.raises(GenAttnError, match="click on a square"):
        head_at(3, 3, {0: 4})
    with pytest.raises(GenAttnError, match="click on a square"):
        head_at(46 + 44 * 5, 30, {0: 4})


def test_heads_are_toggled_and_written_back() -> None:
    layers = {0: 4, 1: 4}
    names = toggle_head("", (1, 2), layers)
    assert names == "L1H2"
    names = toggle_head(names + ",L0H1:0.25", (0, 0), layers)
    assert names == "L0H0,L0H1:0.25,L1H2"
    assert toggle_head(names, (0, 1), layers) == "L0H0,L1H2"
    assert read_heads(" ", layers) == {}
    assert write_heads({}, 0.5) == ""
    with pytest.raises(GenAttnError, match="layer must be one of"):
        toggle_head("L9", (0, 0), layers)


def test_scores_colour_the_map() -> None:
    picture = np.asarray(draw_head_map({0: 3}, {}, {(0, 0): -1.0, (0, 1): 0.0, (0, 2): 1.0}))
    middles = [picture[26 + 22, 46 + 44 * head + 22] for head in range(3)]
    assert middles[0][2] > middles[0][0]
    assert (middles[1] == 255).all()
    assert middles[2][0] > middles[2][2]


@given(st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(1, 90)), st.data())
@settings(max_examples=40, deadline=None)
def test_a_click_on_a_frame_names_the_token(grid: tuple[int, int, int], data: st.DataObject) -> None:
    query = tuple(data.draw(st.integers(0, n - 1)) for n in grid)
    sheet = FrameSheet.around(grid, query[0])
    assert query[0] in sheet.shown
    left, top = sheet.corner(sheet.shown.index(query[0]))
    x, y = left + query[2] * sheet.scale + sheet.scale / 2, top + query[1] * sheet.scale + sheet.scale / 2
    assert sheet.token_at(x, y) == query
    picture = sheet.draw(np.zeros(grid, dtype=bool), query)
    assert picture.getpixel((int(x), int(y))) == (220, 38, 38), "the red square is where a click finds it"
    with pytest.raises(GenAttnError, match="click on a token"):
        sheet.token_at(-5, -5)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_window_picture_is_the_pattern(session: Session) -> None:
    found = mask(session, "radial", None, "6x8x8", query="1x2x3", block=16)
    from genattn.patterns.radial import RadialPattern

    seen = visible_from(RadialPattern(), TokenLayout.from_grid((6, 8, 8)), (1, 2, 3))
    sheet = FrameSheet.around((6, 8, 8), 1)
    for frame, row, column in ((0, 0, 0), (5, 7, 7), (3, 4, 4), (5, 0, 0)):
        left, top = sheet.corner(frame)
        drawn = found["window"].getpixel((left + column * sheet.scale + 3, top + row * sheet.scale + 3))
        assert drawn == ((30, 64, 120) if seen[frame, row, column] else (226, 232, 240))
    assert 0 < found["facts"]["density"] <= 1
    assert found["query"] == "1x2x3"
    left, top = sheet.corner(4)
    assert clicked_token("6x8x8", "1x2x3", left + 1, top + 1) == "4x0x0"


def test_a_preset_says_what_a_run_gains(session: Session) -> None:
    grid, before, after = preset_shape("hunyuan-video")
    assert (grid, before, after) == ("33x45x80", 0, 256)
    facts = mask(session, "radial", None, "8x10x16", after, 0, model="wan-14b")["facts"]
    assert 0 < facts["attention_share"] < 1
    assert facts["run_speedup_dense_quarter"] > 0


def test_what_cannot_be_drawn(session: Session, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="no mask to draw"):
        mask(session, "dense")
    with pytest.raises(GenAttnError, match="must be one of wan-1.3b"):
        mask(session, grid="2x4x4", model="nonsense")
    with pytest.raises(GenAttnError, match="joined by x"):
        mask(session, grid="")
    with pytest.raises(GenAttnError, match="inside 2x4x4, got '2x0x0'"):
        mask(session, grid="2x4x4", query="2x0x0")
    with pytest.raises(GenAttnError, match="at most 4,000 tiles a side"):
        mask(session, grid="1x1x64001", block=16)
    with pytest.raises(GenAttnError, match="at most 20 tokens"):
        mask(Session(tmp_path, limits=Limits(tokens=20)), grid="2x4x4")
    assert read_token(None, TokenLayout.from_grid((4, 6, 8))) == (2, 3, 4)


@pytest.mark.parametrize(("width", "scale", "has_hairs"), [(164, 6, True), (198, 5, False)])
def test_a_hair_stands_between_tokens_that_are_large_enough(width: int, scale: int, has_hairs: bool) -> None:
    sheet = FrameSheet.around((1, 2, width), 0)
    assert sheet.scale == scale
    drawn = np.asarray(sheet.draw(np.ones((1, 2, width), bool), (0, 1, 0)))
    left, top = sheet.corner(0)
    middle = left + 80 * scale  # away from the ring around the query
    assert (drawn[top + 1, middle] == 255).all() == has_hairs
    assert (drawn[top + 1, middle + 1] == (30, 64, 120)).all()


def test_a_ring_stands_around_a_small_query() -> None:
    sheet = FrameSheet.around((1, 20, 100), 0)
    assert sheet.scale < 14
    drawn = np.asarray(sheet.draw(np.zeros((1, 20, 100), bool), (0, 10, 50)))
    left, top = sheet.corner(0)
    rows, columns = np.nonzero((drawn == (220, 38, 38)).all(2))
    inside = rows > top  # the label above is red too
    assert abs(rows[inside].mean() - (top + 10.5 * sheet.scale)) < 1
    assert abs(columns[inside].mean() - (left + 50.5 * sheet.scale)) < 1
    assert np.ptp(columns[inside]) > 2 * sheet.scale


def test_half_the_largest_score_is_half_the_colour() -> None:
    picture = np.asarray(draw_head_map({0: 3}, {}, {(0, 0): 2.0, (0, 1): 4.0, (0, 2): -2.0})).astype(float)
    half, whole, _ = (picture[26 + 22, 46 + 44 * head + 22] for head in range(3))
    assert np.abs((255 + whole) / 2 - half).max() <= 1


@pytest.mark.parametrize(("side", "pixels"), [(10, 24), (30, 14), (420, 1), (900, 1)])
def test_a_tile_is_as_large_as_the_picture_lets_it(side: int, pixels: int) -> None:
    drawn = _draw_tiles(DensePattern(), TokenLayout.from_grid((1, 1, side)), 1)
    assert drawn.size == (side * pixels + 2, side * pixels + 2)
