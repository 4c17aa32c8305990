"""Generalized Neighborhood Attention on grids of 1 to 3 axes, with NATTEN's exact semantics.

    window 5, stride 1        window 4, stride 2       window 4, stride 4       window 3, dilation 2
    sliding (NA)              strided (GNA)            blocked (WSA, Swin)      dilated (DiNA)
    ###..                     ####..                   ####....                 #.#.#.
    ####.                     ####..                   ####....                 .#.#.#
    #####                     .. ####                  ####....                 #.#.#.

Hassani et al., arXiv 2504.16922 (GNA) and 2204.07143 (NA). A query sees a key if every axis shows it; `axis_window` has the
rule of one axis. Text, references and registers see and are seen by all, in the same softmax. Tiles are boxes chosen per grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.axis_window import AxisWindow
from genattn.geometry.plan_build import plan_from_codes, plan_from_rule
from genattn.geometry.separable_codes import SeparableCodes, axis_table
from genattn.geometry.tile_choice import Cuts, choose_cuts, fixed_cuts
from genattn.geometry.tiles import cell_raster, query_key_tiles, token_coords
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule, GridRule
from genattn.patterns.dense import dense_rule, dense_tiles
from genattn.patterns.pattern import Pattern
from genattn.settings import refuse

AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class NeighborhoodPattern(Pattern):
    """Settings of (generalized) neighborhood attention. One value for all axes, or one per axis (frames, height, width).

    window_size: keys per axis, -1 for the full axis. stride: queries that share a window, 1 (sliding) to window_size (blocked).
    dilation: step between keys. is_causal: keys up to the query only, on that axis. circular: the axis wraps around.
    base_size: grid for which the settings were made; windows, strides and dilations scale with the actual grid (-1: same axis).
    tile: "auto" (boxes chosen per grid), "frames" (likewise, but of one frame each), "runs" (raster runs), or the box (frames,
    height, width).
    Leading axes of one token may be left out. A single value leaves axes of one token alone.

    >>> layout = TokenLayout.from_grid((4, 8, 8))
    >>> NeighborhoodPattern((2, 4, 4), stride=(2, 4, 4)).plan(layout, 32, 32).density
    0.125
    """

    window_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: bool | Sequence[bool] = False
    base_size: Sequence[int] | None = None
    circular: bool | Sequence[bool] = False
    tile: Literal["auto", "frames", "runs"] | Sequence[int] = "auto"

    def __post_init__(self) -> None:
        for name in ("window_size", "stride", "dilation"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("is_causal", "circular"):
            object.__setattr__(self, name, _flags(name, getattr(self, name)))
        for name in ("base_size", "tile"):
            value = getattr(self, name)
            if name == "tile" and not isinstance(value, Sequence):
                raise refuse(name, value, "auto, frames, runs, or a size >= 1 per axis")
            if value is not None and not (name == "tile" and isinstance(value, str) and value in ("auto", "frames", "runs")):
                object.__setattr__(self, name, _axis_sizes(name, value))
        self._check_values()
        super().__post_init__()

    @property
    def hides_on_purpose(self) -> bool:
        """Whether an axis is causal."""
        return any(_as_tuple(self.is_causal))

    def _check_values(self) -> None:
        lowest = {"window_size": 1, "stride": 1, "dilation": 1}
        for name, least in lowest.items():
            values = _as_tuple(getattr(self, name))
            if any(v < least and not (name == "window_size" and v == -1) for v in values):
                full = "; use -1 for the full axis" if name == "window_size" else ""
                raise GenAttnError(f"{name} must be >= {least} on every axis, got {getattr(self, name)}{full}")
        lengths = {len(v) for v in vars(self).values() if isinstance(v, tuple)}
        if len(lengths) > 1 or not lengths <= {1, 2, 3}:
            raise GenAttnError(f"settings must name the same 1 to 3 axes, got {sorted(lengths)} values in {self}")

    def axes(self, layout: TokenLayout) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The rule of each axis (frames, height, width) on the grid of `layout`.

        Raises GenAttnError where a setting does not fit, with the nearest legal value.
        """
        given = max((len(v) for v in vars(self).values() if isinstance(v, tuple)), default=3)
        grid = layout.grid3
        if any(n > 1 for n in grid[: 3 - given]):
            raise GenAttnError(
                f"settings for {given} axes do not fit a grid of {'x'.join(map(str, layout.grid or ()))}; "
                f"give one value per axis ({', '.join(AXES[3 - len(layout.grid or ()) :])})"
            )
        return tuple(self._axis(i, n, i - 3 + given) for i, n in enumerate(grid))  # type: ignore[return-value]

    def _axis(self, index: int, length: int, place: int) -> AxisWindow:
        if place < 0:
            return AxisWindow(AXES[index], 1, 1)
        window, stride, dilation = (self._value(n, place, length) for n in ("window_size", "stride", "dilation"))
        if self.base_size is not None and self.base_size[place] != -1:
            window, stride, dilation = _rescaled(length, self.base_size[place], window, stride, dilation)
        if window == -1:
            window = length // min(dilation, length)
            stride = min(stride, window)
        causal, circular = (bool(self._value(n, place, length)) for n in ("is_causal", "circular"))
        return AxisWindow(AXES[index], length, window, stride, dilation, causal, circular)

    def _value(self, name: str, place: int, length: int) -> int:
        value = getattr(self, name)
        if isinstance(value, tuple):
            return value[place]
        return min(value, 1) if length == 1 else value

    def check(self, layout: TokenLayout) -> None:
        """Raise GenAttnError if a setting does not fit the grid."""
        if layout.grid is not None:
            self.axes(layout)

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Who sees whom, over the tokens of `layout`; dilated axes are sorted by group, so that every window is a run."""
        if layout.grid is None:
            return dense_rule(layout)
        frames, rows, columns = axes = self.axes(layout)
        coords = token_coords(layout, layout.grid3).numpy()
        inside = coords[:, 0] >= 0
        low = np.zeros((1, 1, 2, max(rows.length, columns.length)), dtype=np.int32)
        width = np.zeros_like(low)
        for place, axis in enumerate((rows, columns)):
            low[0, 0, place, : axis.length], width[0, 0, place, : axis.length] = _place_windows(axis)
            if not axis.circular:
                coords[inside, place + 1] = axis.rank[coords[inside, place + 1]]
        classes = np.where(frames.mask(), 0, -1).astype(np.int32)[None]
        return GridRule(
            torch.from_numpy(coords),
            torch.from_numpy(classes),
            torch.from_numpy(low),
            torch.from_numpy(width),
            (rows.length, columns.length),
            tuple(a.dilation if a.circular else 1 for a in axes[1:]),  # type: ignore[arg-type]
            (rows.circular, columns.circular),
        )

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The exact plan on box tiles (or raster runs)."""
        if layout.grid is None or self.tile == "runs":
            return plan_from_rule(self.rule(layout), *dense_tiles(layout, block_q, block_k), layout.seqlen)
        axes = self.axes(layout)
        cuts_q, cuts_k = self.cuts(layout, block_q, block_k)
        raster_q = _box_raster(axes, cuts_q, block_q)
        raster_k = raster_q if cuts_q is cuts_k and block_q == block_k else _box_raster(axes, cuts_k, block_k)
        tiles = query_key_tiles(layout, raster_q, raster_k)
        outside = int((layout.raster_index == -1).sum())
        before = [-(-outside // block) for block in (block_q, block_k)]
        after = tiles[0].shape[0] - before[0] - len(raster_q)
        tables = [axis_table(axis, q, k) for axis, q, k in zip(axes, cuts_q, cuts_k)]
        codes = SeparableCodes(tables, (before[0], after), before[1])
        return plan_from_codes(codes, *tiles, self.rule(layout), layout.seqlen)

    def cuts(self, layout: TokenLayout, block_q: int, block_k: int) -> tuple[Cuts, Cuts]:
        """How the axes are cut into query tiles and key tiles of at most `block_q` and `block_k` tokens."""
        axes = self.axes(layout)
        if isinstance(self.tile, tuple):
            tile = (1,) * (3 - len(self.tile)) + self.tile
            return fixed_cuts(axes, tile, block_q), fixed_cuts(axes, tile, block_k)
        return choose_cuts(axes, block_q, block_k, self.tile == "frames")


def _place_windows(axis: AxisWindow) -> tuple[np.ndarray, np.ndarray]:
    """(low, width) per query coordinate: in group order, or, on a circular axis, in the axis' own."""
    if not axis.circular:
        sizes = [g.members.size for g in axis.groups]
        begin = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        low = np.concatenate([g.low for g in axis.groups])
        return low + begin, np.concatenate([g.high for g in axis.groups]) - low
    low = np.empty(axis.length, dtype=np.int64)
    for first, group in enumerate(axis.groups):
        low[group.members] = first + axis.dilation * group.low
    return low % axis.length, np.full(axis.length, (axis.window - 1) * axis.dilation + 1)


def _box_raster(axes: Sequence[AxisWindow], cuts: Cuts, block: int) -> np.ndarray:
    return cell_raster([axis.order for axis in axes], [cut.array for cut in cuts], block)


def _rescaled(length: int, base: int, window: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """Window, stride and dilation made for an axis of `base` tokens, carried over to one of `length`."""
    full = window == -1
    scaled = [max(1, (2 * n * length + base) // (2 * base)) for n in (window, stride, dilation)]
    window = length if full else min(scaled[0], length)
    stride = min(scaled[1], window)
    dilation = min(scaled[2], length if full else length // window)
    return (-1 if full else window), stride, dilation


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _integers(name: str, value: Any) -> int | tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    if not values or any(isinstance(v, bool) or not isinstance(v, int | np.integer) for v in values):
        raise GenAttnError(f"{name} must be an integer, or one per axis, got {value!r}")
    return tuple(int(v) for v in values) if isinstance(value, Sequence) else int(value)


def _flags(name: str, value: Any) -> bool | tuple[bool, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    if not values or not all(isinstance(v, bool) for v in values):
        raise GenAttnError(f"{name} must be True or False, or one per axis, got {value!r}")
    return values if isinstance(value, Sequence) else bool(value)


def _axis_sizes(name: str, value: Any) -> tuple[int, ...]:
    sizes = _integers(name, value)
    least = -1 if name == "base_size" else 1
    if not isinstance(sizes, tuple) or any(n < least or n == 0 for n in sizes):
        extra = "; -1 keeps an axis as it is" if name == "base_size" else "; or 'auto' or 'runs'"
        raise GenAttnError(f"{name} must give a size >= 1 per axis, got {value!r}{extra}")
    return sizes
