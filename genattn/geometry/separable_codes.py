"""Block plans of neighborhood windows on box-shaped tiles: the plan is a product over the axes.

A box sees nothing of another box if one axis sees nothing, and everything if every axis sees everything. So three small tables
(tiles x tiles along one axis) hold the whole plan, whatever the length of the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from genattn.geometry.axis_codes import range_codes
from genattn.geometry.axis_window import AxisWindow


@dataclass(frozen=True)
class AxisCut:
    """How one axis (in the order of `AxisWindow.order`) is cut: edges int64 [n + 1]; no part crosses a dilation group."""

    edges: tuple[int, ...]

    @cached_property
    def array(self) -> np.ndarray:
        return np.asarray(self.edges, dtype=np.int64)

    @cached_property
    def lanes(self) -> int:
        """Tokens of the longest part."""
        return int(np.diff(self.array).max())

    @property
    def parts(self) -> int:
        return len(self.edges) - 1


def cut_axis(axis: AxisWindow, size: int, even: bool = False) -> AxisCut:
    """Parts of at most `size` tokens in each dilation group: of exactly `size` with a rest, or as `even` as possible."""
    edges, begin = [0], 0
    for group in axis.groups:
        n = group.members.size
        parts = -(-n // size)
        ends = [n * (i + 1) // parts for i in range(parts)] if even else [min(n, size * (i + 1)) for i in range(parts)]
        edges += [begin + end for end in ends]
        begin += n
    return AxisCut(tuple(edges))


def axis_table(axis: AxisWindow, cut_q: AxisCut, cut_k: AxisCut) -> np.ndarray:
    """Uint8 [parts_q, parts_k]: 0 nothing, 1 something, 2 everything."""
    table = np.zeros((cut_q.parts, cut_k.parts), dtype=np.uint8)
    begin = 0
    for group in axis.groups:
        end = begin + group.members.size
        inside = [slice(*np.searchsorted(cut.array, (begin, end))) for cut in (cut_q, cut_k)]
        ranges = [np.stack([c.array[:-1][s], c.array[1:][s]], axis=1) - begin for c, s in zip((cut_q, cut_k), inside)]
        codes = range_codes(group.low, group.high - group.low, ranges[0], ranges[1], circular=axis.circular)
        table[inside[0], inside[1]] = codes
        begin = end
    return table


def unions(axis: AxisWindow, cut: AxisCut) -> tuple[np.ndarray, np.ndarray]:
    """(first, end), int64 [parts]: the run of keys, in group order, that a part sees. Not for circular axes."""
    sizes = [group.members.size for group in axis.groups]
    begin = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    low = np.concatenate([g.low for g in axis.groups]) + begin
    high = np.concatenate([g.high for g in axis.groups]) + begin
    return low[cut.array[:-1]], high[cut.array[1:] - 1]


def visits(axis: AxisWindow, cut_q: AxisCut, cut_k: AxisCut) -> np.ndarray:
    """Int64 [parts_q]: key parts that each query part visits, in O(parts)."""
    if axis.circular:
        return np.count_nonzero(axis_table(axis, cut_q, cut_k), axis=1)
    first, end = unions(axis, cut_q)
    part_of = [np.searchsorted(cut_k.array, key, side="right") for key in (first, end - 1)]
    return part_of[1] - part_of[0] + 1


class SeparableCodes:
    """Tile codes from one table per axis, of which there is at least one.

    `dense_q` and `dense_k` count the tiles of globals before, and of padding after.
    """

    num_heads = 1

    def __init__(self, tables: Sequence[np.ndarray], dense_q: tuple[int, int], dense_k: int) -> None:
        self.tables, self.dense_q, self.dense_k = tables, dense_q, dense_k
        self.shape_q = tuple(t.shape[0] for t in tables)
        self.grid_q = int(np.prod(self.shape_q))
        self.grid_k = int(np.prod([t.shape[1] for t in tables]))

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        """Uint8 [stop - start, NK]."""
        codes = np.full((stop - start, self.dense_k + self.grid_k), 2, dtype=np.uint8)
        tiles = np.arange(start, stop) - self.dense_q[0]
        inside = np.flatnonzero((tiles >= 0) & (tiles < self.grid_q))
        if inside.size:
            place = np.unravel_index(tiles[inside], self.shape_q)
            rows = [table[p] for table, p in zip(self.tables, place)]
            block = rows[0]
            for row in rows[1:]:
                block = np.minimum(block[:, :, None], row[:, None, :]).reshape(len(row), -1)
            codes[inside, self.dense_k :] = block
        return codes
