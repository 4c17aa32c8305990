"""Radial Attention: spatial reach that halves each time the distance in frames doubles.

    frames apart     0-1        2-3        4-7        8-15          n tokens of video cost O(n log n)
    window           all        1/2        1/4        1/8           once a window is one token (or cell) wide,
                   #######     .#####.     ..###..     ...#...      only every 2nd, 4th, ... frame is kept

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", NeurIPS 2025
(arXiv 2506.19852), Eq. 4. With s tokens per frame, distance d = |i - j| and r = floor(log2(max(d, 1))):

    paper     |k - l| + 1 <= s / 2^r,  or  k = l and d mod ceil(2^r / s) = 0;  frame 0 is seen by all (sink)
    genattn   the same law over n cells of a frame (a cell is what a kernel tile holds), so that no tile is half used and no
              frame loses its first or last rows:
              |a - b| <= max(floor, round(decay q n / 2^r))  and  d mod q = 0,  q = ceil(2^r / n)
    official  the released code's block mask, see radial_official.py
"""

import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.plan_build import plan_from_codes, tile_codes
from genattn.geometry.tiles import best_box, cell_edges, cell_tiles, query_key_tiles, token_coords
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule, GridRule
from genattn.patterns.dense import dense_rule, dense_tiles
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial_official import official_rule
from genattn.settings import flag, number, one_of, refuse, several, whole_number

Variant = Literal["paper", "official", "genattn"]
_VARIANTS = ("paper", "official", "genattn")
_DEFAULT_DECAY = {"paper": 1.0, "genattn": 0.5}


@dataclass(frozen=True)
class RadialPattern(Pattern):
    """Settings of Radial Attention.

    variant: "genattn" (ours, default), "paper" (Eq. 4) or "official" (the released code's mask).
    decay: > 0, scales the windows; a sequence gives one value per head. None: 1.0 for the paper, 0.5 for genattn, and the
        released scripts' 0.2 (wan) or 0.95 (hunyuan) for official.
    layer_decay: one such value (or sequence) per layer, picked by `for_layer`.
    window: "strip" (raster distance, as published) or "box" (rows and columns apart); box only for genattn.
    sink: whether all tokens see the first frame. None: yes, except in official hunyuan.
    floor: genattn only; cells on each side of its own that a query sees in every kept frame, however small the decay.
    block: tokens per cell (genattn) or per block (official). None: 128, for genattn fewer in frames of under 1024 tokens.
    model, half_window: official only; whose rules, and whether frames one apart see half a frame (Wan before 2025-11-11).
    """

    variant: Variant = "genattn"
    decay: float | Sequence[float] | None = None
    layer_decay: Sequence[float | Sequence[float]] | None = None
    window: Literal["strip", "box"] = "strip"
    sink: bool | None = None
    block: int | None = None
    floor: int = 1
    model: Literal["wan", "hunyuan"] = "wan"
    half_window: bool = False

    def __post_init__(self) -> None:
        one_of("variant", self.variant, _VARIANTS)
        one_of("window", self.window, ("strip", "box"))
        one_of("model", self.model, ("wan", "hunyuan"))
        flag("half_window", self.half_window)
        if self.sink is not None:
            flag("sink", self.sink)
        if self.window == "box" and self.variant != "genattn":
            raise GenAttnError(f"window='box' needs variant='genattn', got variant={self.variant!r}; use window='strip'")
        if self.half_window and (self.variant, self.model) != ("official", "wan"):
            raise GenAttnError(
                "half_window needs variant='official' and model='wan', whose release had it, "
                f"got {self.variant!r} and {self.model!r}; leave it out"
            )
        if self.block is not None:
            block = whole_number("block", self.block, 1, "an integer >= 1; use None for the default")
            object.__setattr__(self, "block", block)
        floor = whole_number("floor", self.floor, 0, "a number of cells >= 0; 1 is the default")
        object.__setattr__(self, "floor", floor)
        object.__setattr__(self, "decay", None if self.decay is None else _checked_decay(self.decay))
        if self.layer_decay is not None:
            if self.decay is not None:
                raise GenAttnError(f"give decay or layer_decay, not both: got {self.decay} and {self.layer_decay}")
            layers = several("layer_decay", self.layer_decay, "a list with one decay per layer")
            object.__setattr__(self, "layer_decay", tuple(_checked_decay(d) for d in layers))
        super().__post_init__()

    def for_layer(self, layer: int, num_layers: int) -> "RadialPattern":
        """This pattern with the decay of one layer. Raises GenAttnError if `layer_decay` has not one value per layer."""
        if self.layer_decay is None:
            return self
        if len(self.layer_decay) != num_layers or not 0 <= layer < num_layers:
            raise GenAttnError(
                f"layer_decay needs one value per layer, got {len(self.layer_decay)} values for layer {layer} of {num_layers}"
            )
        return replace(self, decay=self.layer_decay[layer], layer_decay=None)

    def for_heads(self, first: int, count: int) -> "RadialPattern":
        """The decays of some of the heads."""
        one = len(self.decays) == 1
        return self if one else replace(self, decay=self.decays[first : first + count])

    @property
    def decays(self) -> tuple[float, ...]:
        """Decay per head; one entry when all heads share it."""
        if self.decay is None:
            return (_DEFAULT_DECAY.get(self.variant, 0.2 if self.model == "wan" else 0.95),)
        return self.decay if isinstance(self.decay, tuple) else (float(self.decay),)  # type: ignore[arg-type]

    @property
    def has_sink(self) -> bool:
        """Whether the first frame is seen by all."""
        return not (self.variant == "official" and self.model == "hunyuan") if self.sink is None else self.sink

    def check(self, layout: TokenLayout) -> None:
        """A pattern that differs by layer has no single mask: `for_layer` first."""
        if self.layer_decay is not None:
            raise GenAttnError("layer_decay is set, so each layer has its own mask; call for_layer(layer, num_layers) first")

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Who sees whom, over the tokens of `layout`."""
        if layout.grid is None:
            return dense_rule(layout)
        if self.variant == "official":
            return official_rule(layout, self.decays, self.block or 128, self.model, self.has_sink, self.half_window)
        frames, rows, columns = shape = self._raster(layout)
        classes = torch.from_numpy(self._frame_class(frames, *layout.grid3[1:]))
        heads = [self._windows(frames, rows, columns, decay) for decay in self.decays]
        low, high = (torch.from_numpy(np.stack(part)) for part in zip(*heads))
        classes = classes[None].expand(len(heads), -1, -1).contiguous()
        return GridRule(token_coords(layout, shape), classes, low, high - low, (rows, columns))

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The exact plan on tiles that keep to frames (and to the official mask's blocks)."""
        if layout.grid is None or self.variant == "official":
            tiles = dense_tiles(layout, block_q, block_k)
        else:
            shape, cells = self._raster(layout), self._cells(*layout.grid3[1:])
            raster_q = cell_tiles(shape, cells, block_q)
            raster_k = raster_q if block_q == block_k else cell_tiles(shape, cells, block_k)
            tiles = query_key_tiles(layout, raster_q, raster_k)
        # heads of equal decay share their lists
        distinct = tuple(dict.fromkeys(self.decays))
        codes, rule = tile_codes(replace(self, decay=distinct).rule(layout), *tiles), self.rule(layout)
        choice = [distinct.index(d) for d in self.decays] if rule.num_heads > 1 else None
        return plan_from_codes(codes, *tiles, rule, layout.seqlen, choice)

    def _raster(self, layout: TokenLayout) -> tuple[int, int, int]:
        """(frames, rows, columns) on which windows are drawn: for strips a frame is one row."""
        frames, height, width = layout.grid3
        return (frames, height, width) if self.window == "box" else (frames, 1, height * width)

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        """Cells per frame, (rows, columns); one row of them for strips."""
        tokens = height * width
        block = self.block or (128 if tokens >= 1024 else max(16, 1 << max(0, (tokens // 8).bit_length() - 1)))
        return best_box(height, width, block) if self.window == "box" else (1, -(-tokens // block))

    def _frame_class(self, frames: int, height: int, width: int) -> np.ndarray:
        """Int32 [T, T]: 0 for whole frames, 1 + r for the bands, -1 where a pair of frames is dropped."""
        unit = height * width if self.variant == "paper" else math.prod(self._cells(height, width))
        by_distance = np.zeros(frames, dtype=np.int32)
        for distance in range(2, frames):
            band = distance.bit_length() - 1
            kept = distance % -(-(1 << band) // unit) == 0
            by_distance[distance] = band if kept else -1
        index = np.arange(frames)
        classes = by_distance[np.abs(index[:, None] - index[None, :])]
        if self.has_sink:
            classes[:, 0] = 0
        return classes

    def _windows(self, frames: int, rows: int, columns: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), int32 [C, 2, L]: visible key coordinates per class, place axis and query coordinate."""
        bands = max(1, (frames - 1).bit_length())
        low = np.zeros((bands, 2, max(rows, columns)), dtype=np.int32)
        high = np.zeros_like(low)
        for band in range(bands):
            for axis, length in enumerate((rows, columns)):
                reach = (0, length) if band == 0 else None
                if reach is None and self.variant == "paper":
                    ends = _token_window(length, math.floor(decay * length / 2**band) - 1 if length > 1 else 0)
                elif reach is None:
                    ends = self._cell_window(rows, columns, axis, band, decay)
                else:
                    ends = np.zeros(length), np.full(length, length)
                low[band, axis, :length], high[band, axis, :length] = ends
        return low, high

    def _cell_window(self, rows: int, columns: int, axis: int, band: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
        parts = self._cells(rows, columns) if self.window == "box" else self._cells(1, rows * columns)
        total = math.prod(parts)
        reach = decay * -(-(1 << band) // total) * total / 2**band
        if self.window == "box":
            # a box of the same area as the strip: half sides in the proportions of the frame
            reach = parts[axis] * math.sqrt(reach / (2 * total))
        radius = max(self.floor, math.floor(reach + 0.5))
        length = (rows, columns)[axis]
        edges = cell_edges(length, parts[axis])
        cell = np.searchsorted(edges, np.arange(length), side="right") - 1
        return edges[np.maximum(cell - radius, 0)], edges[np.minimum(cell + radius + 1, parts[axis])]


def _token_window(length: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(length)
    half = max(0, half)
    return np.maximum(index - half, 0), np.minimum(index + half + 1, length)


def _checked_decay(decay: float | Sequence[float]) -> float | tuple[float, ...]:
    what = "a finite number > 0, or one per head; the published values are 0.2 to 1.0"
    most = sys.float_info.max
    if isinstance(decay, numbers.Real):
        return number("decay", decay, 0, most, what, above=True)
    values = several("decay", decay, what)
    if not values:
        raise refuse("decay", decay, what)
    return tuple(number("decay", value, 0, most, what, above=True) for value in values)
