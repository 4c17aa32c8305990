"""Drawn token layouts: 1 to 3 axes, cut grids, text, references, registers and padding anywhere."""

import itertools
import math

from hypothesis import strategies as st

from genattn.geometry.token_layout import Segment, TokenLayout


@st.composite
def layouts(draw: st.DrawFn, longest: int = 7, axes: tuple[int, int] = (1, 3)) -> TokenLayout:
    grid = tuple(draw(st.lists(st.integers(1, longest), min_size=axes[0], max_size=axes[1])))
    total = math.prod(grid)
    cuts = sorted(set(draw(st.lists(st.integers(1, total - 1), max_size=2)))) if total > 1 else []
    ends = [0, *cuts, total]
    segments = [Segment("grid", grid, a, b) for a, b in itertools.pairwise(ends)]
    if draw(st.booleans()):
        segments.reverse()
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["text", "register", "padding", "reference"]))
        segments.insert(draw(st.integers(0, len(segments))), Segment(kind, (draw(st.integers(1, 9)),)))
    return TokenLayout(tuple(segments))
