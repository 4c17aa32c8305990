"""From a neighborhood pattern to a halo plan: per query tile the union of its windows, as one box."""

from collections.abc import Sequence

import numpy as np
import torch

from genattn.axis_window import AxisWindow
from genattn.errors import GenAttnError
from genattn.kernels.element_rule import GLOBAL
from genattn.kernels.halo_plan import HaloPlan
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.separable_codes import AxisCut, unions
from genattn.tile_choice import halo_cuts
from genattn.tiles import cell_raster
from genattn.token_layout import TokenLayout


def halo_plan(pattern: NeighborhoodPattern, layout: TokenLayout, block_q: int = 128) -> HaloPlan:
    """Boxes that follow query tiles of at most `block_q` tokens, for windows that no fixed tiling fits.

    Raises GenAttnError for layouts without a grid, circular axes, and settings that do not fit.
    """
    if layout.grid is None:
        raise GenAttnError(f"a halo plan needs a grid, got the layout {layout.describe()!r}")
    axes = pattern.axes(layout)
    if any(axis.circular for axis in axes):
        raise GenAttnError("a halo plan needs windows that do not wrap around; use plan(), which serves circular axes")
    cuts = halo_cuts(axes, block_q)
    raster = cell_raster([axis.order for axis in axes], [cut.array for cut in cuts], block_q)
    ranges = [unions(axis, cut) for axis, cut in zip(axes, cuts)]
    corners = _outer_rows([np.stack(pair, axis=1) for pair in ranges])
    distinct, box_of_tile = np.unique(corners, axis=0, return_inverse=True)
    places, index = layout.grid_positions, layout.raster_index
    return HaloPlan(
        query_tiles=_places(places, raster),
        box_of_tile=torch.from_numpy(box_of_tile.reshape(-1)),
        boxes=_places(places, _boxes(axes, distinct)),
        whole=torch.from_numpy(_outer_rows([_whole(axis, cut)[:, None] for axis, cut in zip(axes, cuts)]).all(1)),
        shared_keys=torch.nonzero(index == GLOBAL).flatten().to(torch.int32),
        dense_queries=torch.nonzero(index < 0).flatten().to(torch.int32),
        visible_keys=torch.nonzero(index >= GLOBAL).flatten().to(torch.int32),
        rule=pattern.rule(layout),
        seqlen=layout.seqlen,
    )


def _places(places: torch.Tensor, raster: np.ndarray) -> torch.Tensor:
    index = torch.from_numpy(raster)
    return torch.where(index >= 0, places[index.clamp_min(0)], -1).to(torch.int32)


def _whole(axis: AxisWindow, cut: AxisCut) -> np.ndarray:
    """Bool [parts]: every query of the part has the same window."""
    low = np.concatenate([g.low for g in axis.groups])
    high = np.concatenate([g.high for g in axis.groups])
    first, last = cut.array[:-1], cut.array[1:] - 1
    return (low[first] == low[last]) & (high[first] == high[last])


def _outer_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of all combinations, last axis fastest: [n0 * n1 * n2, c0 + c1 + c2]."""
    counts = [len(part) for part in parts]
    place = np.unravel_index(np.arange(int(np.prod(counts))), counts)
    return np.concatenate([part[p] for part, p in zip(parts, place)], axis=1)


def _boxes(axes: Sequence[AxisWindow], corners: np.ndarray) -> np.ndarray:
    """Int64 [n, cap]: raster indices of the tokens of each box (first, end per axis, in group order); -1 after the last."""
    sizes = corners[:, 1::2] - corners[:, ::2]
    out = np.full((len(corners), int(sizes.prod(1).max())), -1, dtype=np.int64)
    for size in np.unique(sizes, axis=0):
        rows = np.flatnonzero((sizes == size).all(1))
        index = np.zeros((rows.size, 1, 1, 1), dtype=np.int64)
        for i, axis in enumerate(axes):
            shape = [rows.size, 1, 1, 1]
            shape[i + 1] = int(size[i])
            along = axis.order[corners[rows, 2 * i][:, None] + np.arange(size[i])].reshape(shape)
            index = index * axis.length + along
        out[rows, : int(size.prod())] = index.reshape(rows.size, -1)
    return out
