"""Layouts that cannot be: pieces outside of their grid, grids of several shapes, gaps and overlaps."""

import re
from typing import Any

import pytest

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout

GRID = (2, 3, 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, 25), (24, None), (0, 0)])
def test_a_piece_must_lie_in_its_grid(start: int, stop: int | None) -> None:
    told = re.escape(f"a piece of {GRID} must lie in [0, 24], got [{start}, {stop}]")
    with pytest.raises(GenAttnError, match=told):
        Segment("grid", GRID, start, stop)


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4), (0,)])
def test_a_segment_has_one_to_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(GenAttnError, match="shape of a segment must be 1 to 3 axes of at least one token each"):
        Segment("grid", shape)


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ((), "a layout needs at least one segment, got none"),
        (("grid",), "segments must be Segment objects, got 'grid'; TokenLayout.from_grid makes the usual ones"),
        (
            (Segment("grid", GRID), Segment("grid", (3, 4))),
            r"must be pieces of one grid, got shapes \[\(2, 3, 4\), \(3, 4\)\]; call the further images 'reference'",
        ),
        ((Segment("grid", GRID, 0, 12),), r"the grid pieces must cover \[0, 24\] once, got \[\(0, 12\)\]"),
        ((Segment("grid", GRID, 12, 24),), r"the grid pieces must cover \[0, 24\] once"),
        ((Segment("grid", GRID, 0, 12), Segment("grid", GRID, 13, 24)), r"must cover \[0, 24\] once"),
        ((Segment("grid", GRID, 0, 12), Segment("grid", GRID, 11, 24)), r"must cover \[0, 24\] once"),
        ((Segment("grid", GRID), Segment("grid", GRID)), r"must cover \[0, 24\] once"),
    ],
)
def test_segments_that_make_no_layout(segments: Any, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        TokenLayout(segments)


def test_pieces_may_stand_in_any_order() -> None:
    layout = TokenLayout((Segment("grid", GRID, 12, 24), Segment("text", (5,)), Segment("grid", GRID, 0, 12)))
    assert (layout.seqlen, layout.grid) == (29, GRID)
