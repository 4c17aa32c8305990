"""How fast a pattern can be, from geometry alone.

    simulate((30, 48, 80), (18, 24, 24), stride=(16, 8, 8), tile_q=(4, 8, 8), tile_k=(2, 8, 8), attention_share=0.607)

Two bounds. `worst_tile` is NATTENSim's (arXiv 2504.16922, appendix B.1, never released): key tiles of dense attention over the
most that any query tile visits; it is about the slowest tile and ignores padding. `total_work` is what all tiles multiply,
unused lanes included, against dense attention without padding; it is about throughput. Both are below `flops`, the share of
scores that are wanted at all. A run gains 1 / (1 - f + f / S) for the share f of its time (Amdahl).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genattn.errors import GenAttnError
from genattn.geometry.separable_codes import AxisCut, axis_table, unions
from genattn.geometry.tile_choice import fixed_cuts
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern


@dataclass(frozen=True)
class Simulation:
    """What a plan costs against dense attention over the same tokens.

    tile_q, tile_k: boxes, or None where tiles are not boxes. flops, worst_tile, total_work: speed-up bounds, >= 1 is faster.
    mask_free: share of visited tile pairs that need no mask. padding: share of tile lanes that hold no token, (queries, keys).
    density: share of the scores in visited tiles. end_to_end: of a whole run, by `worst_tile` and by `total_work`.
    """

    grid: tuple[int, ...]
    tile_q: tuple[int, ...] | None
    tile_k: tuple[int, ...] | None
    flops: float | None
    worst_tile: float
    total_work: float
    mask_free: float
    padding: tuple[float, float]
    density: float
    end_to_end: tuple[float, float]


def simulate(
    grid: Sequence[int],
    window_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    tile_q: Sequence[int] | None = None,
    tile_k: Sequence[int] | None = None,
    block: int = 128,
    halo: bool = False,
    attention_share: float = 1.0,
) -> Simulation:
    """Bounds for neighborhood attention on a grid of 1 to 3 axes.

    tile_q, tile_k: boxes; None takes the boxes with the least work for `block` lanes. halo: the key box follows each query
    tile and is cut into blocks of prod(tile_k) without alignment. attention_share: share of a run's time that becomes sparse.

    Raises GenAttnError for settings that do not fit the grid.

    >>> found = simulate((30, 48, 80), (18, 24, 24), (16, 8, 8), tile_q=(4, 8, 8), tile_k=(2, 8, 8))
    >>> round(found.worst_tile, 2)
    11.11
    """
    if block < 1:
        raise GenAttnError(f"block must be >= 1, got {block}; tiles hold 128 tokens by default")
    pattern, layout = NeighborhoodPattern(window_size, stride, dilation, is_causal), TokenLayout.from_grid(grid)
    axes = pattern.axes(layout)
    chosen = pattern.cuts(layout, block, block) if tile_q is None or tile_k is None else ((), ())
    cuts_q = chosen[0] if tile_q is None else fixed_cuts(axes, _three(tile_q), math.prod(tile_q))
    cuts_k = chosen[1] if tile_k is None else fixed_cuts(axes, _three(tile_k), math.prod(tile_k))
    lanes_q = block if tile_q is None else math.prod(tile_q)
    lanes_k = block if tile_k is None else math.prod(tile_k)
    total, tiles_k = layout.seqlen, math.prod(c.parts for c in cuts_k)
    tables = [axis_table(axis, q, k) for axis, q, k in zip(axes, cuts_q, cuts_k)]
    per_axis = [np.count_nonzero(table, axis=1) for table in tables]
    most, pairs = (float(math.prod(int(x) for x in v)) for v in zip(*((n.max(), n.sum()) for n in per_axis)))
    free = math.prod(int(np.count_nonzero(t == 2)) for t in tables) / pairs
    density = math.prod(_shown(*part) for part in zip(tables, cuts_q, cuts_k)) / total**2
    if halo:
        rows = _outer([np.diff(cut.array) for cut in cuts_q])
        keys = _outer([np.subtract(*unions(axis, cut)[::-1]) for axis, cut in zip(axes, cuts_q)])
        boxes = np.ceil(keys / lanes_k)
        most, pairs, free, tiles_k = float(boxes.max()), float(boxes.sum()), 0.0, -(-total // lanes_k)
        density = float((rows * keys).sum()) / total**2
    work = total**2 / (pairs * lanes_q * lanes_k)
    worst = tiles_k / most
    return Simulation(
        grid=layout.grid or (),
        tile_q=_box(cuts_q) if tile_q is None else tuple(tile_q),
        tile_k=_box(cuts_k) if tile_k is None else tuple(tile_k),
        flops=math.prod(a.length / min(a.length, a.window) for a in axes),
        worst_tile=worst,
        total_work=work,
        mask_free=free,
        padding=(_padding(cuts_q, lanes_q, total), 0.0 if halo else _padding(cuts_k, lanes_k, total)),
        density=density,
        end_to_end=(end_to_end(worst, attention_share), end_to_end(work, attention_share)),
    )


def simulate_pattern(
    pattern: Pattern, layout: TokenLayout, block_q: int = 128, block_k: int = 128, attention_share: float = 1.0
) -> Simulation:
    """The same for any pattern, from its block plan; no share of wanted scores."""
    plan = pattern.plan(layout, block_q, block_k)
    lanes = [float((t >= 0).float().mean()) for t in (plan.query_tiles, plan.key_tiles)]
    worst = plan.key_tiles.shape[0] / float(plan.row_lengths.max())
    work = 1.0 / plan.computed_density
    share = attention_share
    return Simulation(
        grid=layout.grid or (),
        tile_q=None,
        tile_k=None,
        flops=None,
        worst_tile=worst,
        total_work=work,
        mask_free=plan.full_share,
        padding=(1 - lanes[0], 1 - lanes[1]),
        density=plan.density,
        end_to_end=(end_to_end(worst, share), end_to_end(work, share)),
    )


def end_to_end(speedup: float, share: float) -> float:
    """Speed-up of a whole whose part `share` in [0, 1] becomes `speedup` times as fast. Raises GenAttnError outside that."""
    if not 0 <= share <= 1 or speedup <= 0:
        raise GenAttnError(f"share must be in [0, 1] and speedup > 0, got {share} and {speedup}")
    return 1.0 / (1.0 - share + share / speedup)


def _three(tile: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (3 - len(tile)) + tuple(tile)


def _box(cuts: Sequence[AxisCut]) -> tuple[int, ...]:
    return tuple(cut.lanes for cut in cuts)


def _shown(table: np.ndarray, cut_q: AxisCut, cut_k: AxisCut) -> int:
    """Scores of one axis in visited parts."""
    return int(np.diff(cut_q.array) @ (table > 0).astype(np.int64) @ np.diff(cut_k.array))


def _outer(values: Sequence[np.ndarray]) -> np.ndarray:
    product = np.ones(())
    for axis in values:
        product = product[..., None] * axis
    return product


def _padding(cuts: Sequence[AxisCut], lanes: int, total: int) -> float:
    return 1 - total / (math.prod(c.parts for c in cuts) * lanes)
