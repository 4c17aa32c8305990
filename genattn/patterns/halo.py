"""From a neighborhood pattern to a halo plan: per query tile the union of its windows, as one box."""

from functools import lru_cache

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.axis_window import AxisWindow
from genattn.geometry.separable_codes import AxisCut, unions
from genattn.geometry.tile_choice import halo_cuts
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.element_rule import GLOBAL
from genattn.kernels.plan.halo_plan import HaloParts, HaloPlan
from genattn.kernels.plan.lasting import lasting
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern


@lru_cache(maxsize=64)
@lasting
def halo_plan(pattern: Pattern, layout: TokenLayout, block_q: int = 128) -> HaloPlan:
    """Boxes that follow query tiles of at most `block_q` tokens, for windows that no fixed tiling fits.

    Kept by its settings. Raises GenAttnError for other patterns, layouts without a grid, circular axes, and settings that do
    not fit.
    """
    reason = why_not_halo(pattern, layout)
    if reason is not None:
        raise GenAttnError(reason)
    assert isinstance(pattern, NeighborhoodPattern)
    axes = pattern.axes(layout)
    index, places = layout.raster_index, layout.grid_positions
    in_place = places.numel() == layout.seqlen and layout.is_contiguous
    return HaloPlan(
        axes=tuple(_kinds(axis, cut) for axis, cut in zip(axes, halo_cuts(axes, block_q))),  # type: ignore[arg-type]
        extent=layout.grid3,
        places=None if in_place else places,
        shared_keys=torch.nonzero(index == GLOBAL).flatten(),
        dense_queries=torch.nonzero(index < 0).flatten(),
        visible_keys=torch.nonzero(index >= GLOBAL).flatten(),
        seqlen=layout.seqlen,
    )


def why_not_halo(pattern: Pattern, layout: TokenLayout) -> str | None:
    """The reason why boxes that follow the query tile cannot serve this pattern on this layout, or None."""
    if not isinstance(pattern, NeighborhoodPattern):
        return f"a halo plan is for NeighborhoodPattern, got {type(pattern).__name__}"
    if pattern.tail_of_heads() is not None:
        return f"boxes that follow the query tile skip no tiles that tail={pattern.tail!r} could stand in for; use tail=None"
    if layout.grid is None:
        return f"a halo plan needs a grid, got the layout {layout.describe()!r}"
    if any(axis.circular for axis in pattern.axes(layout)):
        return "a halo plan needs windows that do not wrap around; use plan(), which serves circular axes"
    return None


def _kinds(axis: AxisWindow, cut: AxisCut) -> tuple[HaloParts, ...]:
    """The parts of an axis, those together that look alike from their own key range."""
    sizes = [group.members.size for group in axis.groups]
    begin = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    low = np.concatenate([g.low for g in axis.groups]) + begin
    high = np.concatenate([g.high for g in axis.groups]) + begin
    first, end = unions(axis, cut)
    alike: dict[tuple[bytes, int], list[int]] = {}
    for part, (start, stop) in enumerate(zip(cut.array[:-1], cut.array[1:])):
        look = np.stack([low[start:stop], high[start:stop]]) - first[part]
        alike.setdefault((look.tobytes(), int(end[part] - first[part])), []).append(part)
    kinds = []
    for (look, keys), parts in alike.items():
        lows, highs = np.frombuffer(look, dtype=np.int64).reshape(2, -1)
        at = np.arange(keys)
        seen = (at >= lows[:, None]) & (at < highs[:, None])
        rows, box = (axis.order[np.asarray(s)[parts][:, None] + np.arange(n)] for s, n in
                     ((cut.array[:-1], len(lows)), (first, keys)))  # fmt: skip
        kinds.append(HaloParts(*(torch.from_numpy(np.ascontiguousarray(t)) for t in (rows, box, seen))))
    return tuple(kinds)
