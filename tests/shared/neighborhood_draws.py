"""Neighborhood patterns drawn at random, legal for a layout."""

from hypothesis import strategies as st

from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern


@st.composite
def settings_for(draw: st.DrawFn, layout: TokenLayout) -> NeighborhoodPattern:
    """Legal settings for the grid of `layout`."""
    window, stride, dilation, causal, circular = [], [], [], [], []
    for length in layout.grid or ():
        d = draw(st.integers(1, min(3, length)))
        wraps = draw(st.booleans()) and length % d == 0
        k = draw(st.one_of(st.just(-1), st.integers(1, length // d)))
        dilation.append(d)
        window.append(k)
        stride.append(draw(st.integers(1, max(k, 1))))
        circular.append(wraps)
        causal.append(draw(st.booleans()) and not wraps)
    tile = draw(st.sampled_from(["auto", "frames", "runs"]))
    return NeighborhoodPattern(window, stride, dilation, causal, circular=circular, tile=tile)
