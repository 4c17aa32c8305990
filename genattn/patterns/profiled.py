"""A pattern from a profile: per layer, head and part of the run the cells that a few prompts needed; no choice per call.

That the sparse pattern of a layer and head is stable over prompts, so that it may be found once: SVOO (arXiv 2603.18636) and
ScalingAttention (arXiv 2606.23019). Here the map is kept by relative place (selection/relative_map.py), so that it serves other
sizes and frame counts, and what is skipped can be stood in for: with a tail cells are ranked by what standing in would lose,
without one by their mass. Text is always seen and sees all; every query sees its own cell.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.plan_build import plan_from_rule
from genattn.geometry.tiles import best_box, cell_tiles
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import BlockRule, ElementRule
from genattn.patterns.pattern import Pattern
from genattn.selection.profile_map import ProfileMap, read_map
from genattn.selection.relative_map import predict
from genattn.selection.tiling import Boxes
from genattn.settings import number, whole_number


@dataclass(frozen=True)
class ProfiledPattern(Pattern):
    """The map in the safetensors file `path`.

    density: share of the grid's scores instead of the one it was profiled for, in (0, 1]; what is dense anyway (text) comes on
    top. block: tokens per cell; None: what suits the length of the sequence. layer, band, heads: set by for_layer, for_step and
    for_heads.

    Raises GenAttnError at once for a file that cannot be used.
    """

    path: str
    density: float | None = None
    block: int | None = None
    layer: int | None = None
    band: int | None = None
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if self.density is not None:
            density = number("density", self.density, 0, 1, "a share of the scores in (0, 1]", above=True)
            object.__setattr__(self, "density", density)
        if self.block is not None:
            block = whole_number("block", self.block, 1, "a number of tokens per cell >= 1; None suits most")
            object.__setattr__(self, "block", block)
        read_map(self.path)
        super().__post_init__()

    @property
    def map(self) -> ProfileMap:
        """Header and tensors; read once."""
        return read_map(self.path)

    def check_model(self, name: str, heads: tuple[int, ...], layers: int) -> None:
        """Raise GenAttnError unless the map was made on a model of this class, with as many layers and heads."""
        made = self.map.header
        if (name, layers) != (made.model, made.layers) or set(heads) != {made.heads}:
            counts = "/".join(str(n) for n in sorted(set(heads)))
            raise GenAttnError(
                f"the map {self.path} was made for {made.model} with {made.layers} layers of {made.heads} heads, "
                f"got {name} with {layers} layers of {counts} heads; run `genattn profile` on this model"
            )

    def for_layer(self, layer: int, num_layers: int) -> "ProfiledPattern":
        """The map of one layer. Raises GenAttnError if the map has another number of layers."""
        made = self.map.header.layers
        if num_layers != made or not 0 <= layer < made:
            raise GenAttnError(f"the map {self.path} has {made} layers, got layer {layer} of {num_layers}; profile this model")
        return replace(self, layer=layer)

    def for_step(self, step: int = -1, fraction: float | None = None) -> "ProfiledPattern":
        """The map of one part of the run; the mean of all parts where it is unknown."""
        return replace(self, band=self.map.header.band(fraction))

    def for_heads(self, first: int, count: int) -> "ProfiledPattern":
        """The map of some of the heads."""
        return replace(self, heads=(first, count))

    def check(self, layout: TokenLayout) -> None:
        """A map of several layers has no single mask; without a grid there are no places."""
        if self._layer is None:
            raise GenAttnError("a profiled map has one mask per layer; call for_layer(layer, num_layers) first")
        if layout.grid is None:
            raise GenAttnError(f"a profiled map needs a grid, got the layout {layout.describe()!r}")

    @property
    def _layer(self) -> int | None:
        return 0 if self.layer is None and self.map.header.layers == 1 else self.layer

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Which cell sees which, per head."""
        self.check(layout)
        cells, place = cells_of(layout, self._block(layout))
        return BlockRule(self._kept(layout, cells), cells.shape[1], place)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """On boxes of a frame, which are the cells where the block sizes agree."""
        tiles = Boxes().tiles(layout, block_q, block_k)
        return plan_from_rule(self.rule(layout), *tiles, layout.seqlen)

    def _block(self, layout: TokenLayout) -> int:
        return self.block or usual_cell(layout)

    def _kept(self, layout: TokenLayout, cells: np.ndarray) -> torch.Tensor:
        """Bool [H, N, N]: per row of cells the best ones until the head's share is reached."""
        found, layer = self.map, self._layer
        assert layer is not None
        tables = found.at(self._value, layer, self.band)
        tokens = torch.from_numpy((cells >= 0).sum(1))
        least = 1 / len(cells)  # every query sees its own cell
        spread = found.spread(self._value, self.density or found.header.target_density, least)[layer]
        shares = spread.mean(1) if self.band is None else spread[:, self.band]
        if self.heads is not None:
            first, count = self.heads
            tables = tuple(t[first : first + count] for t in tables)  # type: ignore[assignment]
            shares = shares[first : first + count]
        values = predict(*tables, found.cells, cell_places(layout, cells), layout.grid3[0])
        return keep_rows(values, shares, tokens)

    @property
    def _value(self) -> str:
        return "loss" if self.tail not in (None, "auto") else "mass"


def usual_cell(layout: TokenLayout) -> int:
    """Tokens per cell: 128 for long sequences, fewer for short ones, at least 16."""
    return max(16, min(128, 1 << max(1, layout.seqlen // 32).bit_length() - 1))


def cells_of(layout: TokenLayout, block: int) -> tuple[np.ndarray, torch.Tensor]:
    """(cells int64 [N, block] of raster indices, -1 unused; place int32 [S] of each token when cells are laid end to end).

    place is -1 for global tokens, -2 for padding.
    """
    frames, height, width = layout.grid3
    cells = cell_tiles((frames, height, width), best_box(height, width, block), block)
    spot = np.empty(frames * height * width, dtype=np.int64)
    used = cells >= 0
    spot[cells[used]] = np.flatnonzero(used.reshape(-1))
    index = layout.raster_index.numpy()
    place = np.where(index >= 0, spot[np.maximum(index, 0)], index).astype(np.int32)
    return cells, torch.from_numpy(place)


def cell_places(layout: TokenLayout, cells: np.ndarray) -> torch.Tensor:
    """Float32 [N, 3]: centre of each cell: frame, and row and column as shares of the frame."""
    _, height, width = layout.grid3
    used = cells >= 0
    index = np.maximum(cells, 0)
    parts = index // (height * width), (index // width % height + 0.5) / height, (index % width + 0.5) / width
    count = used.sum(1)
    return torch.from_numpy(np.stack([(p * used).sum(1) / count for p in parts], -1)).float()


def keep_rows(values: torch.Tensor, shares: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Bool [H, N, N]: in each row its own cell and the largest values, such that a head visits `shares` [H] of all scores.

    tokens: int [N] of each cell. A row keeps whole cells; what rounding leaves is given to the rows in turn, so that the sum
    over a head comes out within one cell.
    """
    heads, cells, _ = values.shape
    own = torch.eye(cells, dtype=torch.bool)
    order = values.masked_fill(own, torch.inf).argsort(dim=-1, descending=True, stable=True)
    total = tokens.double()[order].cumsum(-1)
    wanted = shares.double()[:, None] * float(tokens.sum())
    # row i may have what is due to rows 0..i less what they took
    kept = torch.zeros_like(values, dtype=torch.bool)
    debt = torch.zeros(heads, dtype=torch.float64)
    for row in range(cells):
        due = wanted[:, 0] + debt / tokens[row]
        count = (total[:, row] - tokens.double()[order[:, row]] / 2 <= due[:, None] + 1e-9).sum(-1).clamp_min(1)
        spent = total[:, row].gather(-1, count[:, None] - 1)[:, 0]
        debt = (due - spent) * tokens[row]
        kept[:, row] = torch.zeros(heads, cells, dtype=torch.bool).scatter_(
            -1, order[:, row], torch.arange(cells) < count[:, None]
        )
    return kept
