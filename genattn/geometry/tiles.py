"""How tokens are cut into tiles, and where each token stands on the grid.

    frame of 45 x 80, block 128          strip tiles: 29 runs of 124 or 125 tokens in each frame
                                         box tiles:   5 x 6 boxes of 9 x 13..14 tokens in each frame

Tiles never mix grid tokens with text: a text tile sees everything and is seen by everything, so one text token in a grid tile
would make its whole row dense. Padding stands in query tiles only. A ragged axis is cut into near-equal parts and unused lanes
are -1 inside the tile; the tensors themselves are never padded.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.element_rule import GLOBAL, PADDING

MIN_FILL = 0.85


def cell_edges(length: int, parts: int) -> np.ndarray:
    """Int64 [parts + 1]: `length` tokens cut into near-equal parts (sizes differ by at most one)."""
    return np.arange(parts + 1, dtype=np.int64) * length // parts


def best_box(height: int, width: int, block: int) -> tuple[int, int]:
    """Parts per axis (rows of boxes, columns of boxes) such that each box holds at most `block` tokens.

    Least waste first; between equals the squarest box, because a square window costs the fewest boxes.
    """
    best: tuple[float, int, int] = (math.inf, 1, 1)
    for rows in range(1, height + 1):
        tall = -(-height // rows)
        if tall > block:
            continue
        columns = -(-width // max(1, block // tall))
        waste = rows * columns * block / (height * width)
        aspect = abs(math.log(tall / -(-width // columns)))
        best = min(best, (waste + 0.05 * aspect, rows, columns))
    return best[1], best[2]


def token_coords(layout: TokenLayout, shape: Sequence[int]) -> torch.Tensor:
    """Int32 [S, 3]: (t, y, x) of each token on a raster of `shape` (frames, rows, columns); -1 global, -2 padding."""
    index = layout.raster_index.numpy()
    _, rows, columns = shape
    inside = np.maximum(index, 0).astype(np.int32)
    line = inside // columns
    coords = np.empty((index.size, 3), dtype=np.int32)
    coords[:, 2] = inside - line * columns
    coords[:, 0] = line // rows
    coords[:, 1] = line - coords[:, 0] * rows
    outside = index < 0
    if outside.any():
        coords[outside] = 0
        coords[outside, 0] = np.where(index[outside] == -1, GLOBAL, PADDING)
    return torch.from_numpy(coords)


def run_raster(total: int, block: int) -> np.ndarray:
    """Int64 [n, block]: raster order cut into runs, across rows and frames; -1 fills the last."""
    index = np.arange(-(-total // block) * block, dtype=np.int64).reshape(-1, block)
    return np.where(index < total, index, -1)


def cell_raster(orders: Sequence[np.ndarray], edges: Sequence[np.ndarray], block: int) -> np.ndarray:
    """Int64 [n, block]: one tile per box of cells, raster indices; -1 fills each tile to `block`.

    orders: per axis the coordinates in the order in which they are cut (a permutation of the axis); edges: per axis where to
    cut. Raises ValueError if a box holds more than `block` tokens.
    """
    sizes = [len(order) for order in orders]
    axis_cells = [_padded_cells(order, edge) for order, edge in zip(orders, edges)]
    lanes = math.prod(cells.shape[1] for cells in axis_cells)
    if lanes > block:
        raise ValueError(f"a tile must hold at most {block} tokens, got boxes of {[c.shape[1] for c in axis_cells]}")
    index = np.zeros((1,) * (2 * len(orders)), dtype=np.int64)
    used = np.ones_like(index, dtype=bool)
    for axis, cells in enumerate(axis_cells):
        shape = [1] * (2 * len(orders))
        shape[axis], shape[len(orders) + axis] = cells.shape
        index = index * sizes[axis] + np.maximum(cells, 0).reshape(shape)
        used = used & (cells >= 0).reshape(shape)
    index = np.where(used, index, -1).reshape(-1, lanes)
    if not used.all():
        index = np.take_along_axis(index, np.argsort(index < 0, axis=1, kind="stable"), axis=1)
    return np.pad(index, ((0, 0), (0, block - lanes)), constant_values=-1)


def _padded_cells(order: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[cells, widest]: the coordinates of each cell of one axis, -1 after the last."""
    place = edges[:-1, None] + np.arange(int(np.diff(edges).max()))
    return np.where(place < edges[1:, None], order[np.minimum(place, len(order) - 1)], -1)


def even_cells(shape: Sequence[int], parts: Sequence[int], block: int) -> np.ndarray:
    """`cell_raster` for axes in their own order, cut into near-equal `parts`."""
    orders = [np.arange(n, dtype=np.int64) for n in shape]
    return cell_raster(orders, [cell_edges(n, p) for n, p in zip(shape, parts)], block)


def cell_tiles(shape: Sequence[int], cells: tuple[int, int], block: int) -> np.ndarray:
    """Frame-aligned tiles of a raster (frames, rows, columns), whole or divided `cells` of a frame where a tile holds them.

    Plain runs across frames where alignment would leave too many lanes unused.
    """
    frames, rows, columns = shape
    tall, wide = (-(-n // c) for n, c in zip((rows, columns), cells))
    inner = best_box(tall, wide, block)
    nested = min(rows, cells[0] * inner[0]), min(columns, cells[1] * inner[1])
    for parts in (nested, best_box(rows, columns, block)):
        if rows * columns >= MIN_FILL * parts[0] * parts[1] * block:
            return even_cells(shape, (frames, *parts), block)
    return run_raster(frames * rows * columns, block)


def query_key_tiles(layout: TokenLayout, raster_q: np.ndarray, raster_k: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(query tiles, key tiles), int32 [n, block] token indices: global tokens first, then the grid, then padding (queries)."""
    shared = raster_q is raster_k and not bool((layout.raster_index == PADDING).any())
    query = _token_tiles(layout, raster_q, (GLOBAL,), (PADDING,))
    return query, query if shared else _token_tiles(layout, raster_k, (GLOBAL,), ())


def _token_tiles(layout: TokenLayout, raster: np.ndarray, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    block = raster.shape[1]
    index = layout.raster_index.numpy()
    parts = [_runs_of(np.flatnonzero(index == code), block) for code in before]
    if layout.grid is not None:
        places = layout.grid_positions.numpy()
        parts.append(raster if layout.is_contiguous and places[0] == 0 else np.where(raster >= 0, places[raster], -1))
    parts += [_runs_of(np.flatnonzero(index == code), block) for code in after]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def _runs_of(tokens: np.ndarray, block: int) -> np.ndarray:
    runs = run_raster(tokens.size, block)
    return np.where(runs >= 0, tokens[runs], -1) if tokens.size else runs


@lru_cache(maxsize=32)
def empty_raster(block: int) -> np.ndarray:
    """No grid tiles at all: layouts that are only text."""
    return np.empty((0, block), dtype=np.int64)
