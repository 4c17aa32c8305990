"""From a neighborhood pattern to the arguments of NATTEN, whose semantics it shares."""

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.peers.optional import GridWindows
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern


def natten_windows(pattern: Pattern, layout: TokenLayout) -> GridWindows:
    """Windows, strides, dilations and causal flags per axis of the grid.

    Raises GenAttnError for other patterns, for layouts with anything but a grid, and for circular axes.
    """
    if not isinstance(pattern, NeighborhoodPattern):
        raise GenAttnError(f"impl='natten' serves NeighborhoodPattern, got {type(pattern).__name__}")
    if pattern.tail_of_heads() is not None:
        raise GenAttnError(f"impl='natten' has no stand-in for what it skips, got tail={pattern.tail!r}; use tail=None")
    if layout.grid is None or len(layout.segments) > 1:
        raise GenAttnError(f"impl='natten' serves a grid without text, got the layout {layout.describe()!r}")
    axes = pattern.axes(layout)[3 - len(layout.grid) :]
    if any(axis.circular for axis in axes):
        raise GenAttnError("impl='natten' has no windows that wrap around; use impl='auto'")
    columns = ((axis.length, axis.window, axis.stride, axis.dilation, axis.causal) for axis in axes)
    return GridWindows(*zip(*columns))  # type: ignore[arg-type]
