"""Which box of tokens makes a tile: the one for which the fewest tile pairs are visited, padding lanes included.

    Wan 720p, 21 x 45 x 80, window 9 x 25 x 40, stride 3 x 5 x 8, 128 lanes:   3 x 5 x 8 boxes, no padding at any border,
                                                                               every visited tile is full

A tile pair costs BLOCK_Q x BLOCK_K whatever it holds, so pairs are the work. Pairs multiply over the axes, so every box that
fits is tried. Sufficient for a plan without masks: tile t divides the axis, window n t, stride m t, and n - m is even.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from genattn.errors import GenAttnError
from genattn.geometry.axis_window import AxisWindow
from genattn.geometry.separable_codes import AxisCut, axis_table, cut_axis, unions, visits

# a masked tile pair costs about a quarter more than a full one (loads of tables and compares beside the two products)
MASK_COST = 0.25
_EXACT_PARTS = 512

Cuts = tuple[AxisCut, ...]


@dataclass(frozen=True)
class _Choice:
    cut: AxisCut
    pairs: float
    full: float


@lru_cache(maxsize=256)
def choose_cuts(axes: tuple[AxisWindow, ...], block_q: int, block_k: int, within_frames: bool = False) -> tuple[Cuts, Cuts]:
    """(query cuts, key cuts) per axis with at most `block_q` and `block_k` lanes in a box; of one frame where asked for."""
    query = _best(axes, block_q, None, within_frames)
    return query, query if block_q == block_k else _best(axes, block_k, query, within_frames)


@lru_cache(maxsize=64)
def halo_cuts(axes: tuple[AxisWindow, ...], block: int) -> Cuts:
    """Query cuts for boxes that follow the query tile: the least keys over all tiles, unused lanes included."""
    options = []
    for i, axis in enumerate(axes):
        keys = ((cut, np.subtract(*unions(axis, cut)[::-1]).sum()) for cut in _cuts(axis, block, _least(axes, i, block)))
        options.append([_Choice(cut, float(n), 0.0) for cut, n in keys])
    return _cheapest(options, block)


def fixed_cuts(axes: tuple[AxisWindow, ...], tile: tuple[int, ...], block: int) -> Cuts:
    """Cuts for a tile that the user asked for. Raises GenAttnError if it does not fit the block or the axes."""
    lanes = int(np.prod(tile))
    if lanes > block:
        raise GenAttnError(
            f"tile {tile} holds {lanes} tokens, but a block has {block} lanes; use a smaller tile or a larger block"
        )
    for axis, size in zip(axes, tile):
        if not 1 <= size <= axis.length:
            raise GenAttnError(
                f"tile must be between 1 and {axis.length} on the {axis.name} axis, got {size}; "
                f"nearest legal value: {min(max(size, 1), axis.length)}"
            )
    return tuple(cut_axis(axis, size) for axis, size in zip(axes, tile))


def is_mask_free(length: int, tile: int, window: int, stride: int) -> bool:
    """The parity rule: true only if no visited tile needs a mask along this axis (sufficient, not necessary)."""
    if length % tile or window % tile or stride % tile:
        return False
    return (window // tile - stride // tile) % 2 == 0 or window == length


def _best(axes: tuple[AxisWindow, ...], block: int, query: Cuts | None, within_frames: bool) -> Cuts:
    options, flat = [], int(within_frames)  # axes along which a box is one token
    for i, axis in enumerate(axes):
        most, least = (1, 1) if i < flat else (block, _least(axes[flat:], i - flat, block))
        options.append(_options(axis, most, least, None if query is None else query[i]))
    return _cheapest(options, block)


def _cheapest(options: list[list[_Choice]], block: int) -> Cuts:
    lanes = _outer([[o.cut.lanes for o in axis] for axis in options])
    pairs = _outer([[o.pairs for o in axis] for axis in options])
    full = _outer([[o.full for o in axis] for axis in options])
    cost = np.where(lanes <= block, pairs * (1 + MASK_COST * (1 - full)), np.inf)
    place = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return tuple(axis[i].cut for axis, i in zip(options, place))


def _least(axes: tuple[AxisWindow, ...], place: int, block: int) -> int:
    """Shorter parts than this leave half of the block unused whatever the other axes do."""
    others = math.prod(max(g.members.size for g in a.groups) for i, a in enumerate(axes) if i != place)
    return max(1, block // (2 * others))


def _cuts(axis: AxisWindow, block: int, least: int) -> list[AxisCut]:
    longest = max(g.members.size for g in axis.groups)
    sizes = range(min(least, longest), min(longest, block) + 1)
    return sorted({cut_axis(axis, size, even) for size in sizes for even in (False, True)}, key=lambda c: c.edges)


def _options(axis: AxisWindow, most: int, least: int, query: AxisCut | None) -> list[_Choice]:
    found: dict[tuple[int, int], _Choice] = {}
    for cut in _cuts(axis, most, least):
        choice = _weigh(axis, cut, query or cut)
        kept = found.get((cut.lanes, cut.parts))
        if kept is None or (choice.pairs, -choice.full) < (kept.pairs, -kept.full):
            found[cut.lanes, cut.parts] = choice
    return list(found.values())


def _weigh(axis: AxisWindow, cut: AxisCut, query: AxisCut) -> _Choice:
    if max(cut.parts, query.parts) > _EXACT_PARTS:
        return _Choice(cut, float(visits(axis, query, cut).sum()), 0.0)
    table = axis_table(axis, query, cut)
    pairs = int(np.count_nonzero(table))
    return _Choice(cut, float(pairs), np.count_nonzero(table == 2) / pairs)


def _outer(values: list[list[float]]) -> np.ndarray:
    product = np.ones(())
    for axis in values:
        product = product[..., None] * np.asarray(axis, dtype=np.float64)
    return product
