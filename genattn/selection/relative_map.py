"""An attention map stored by relative place: small, and good for other sizes and frame counts.

    log value(i, j) = relative[dt, dy, dx] + key_place[t_j, y_j, x_j] + query_place[t_i, y_i, x_i]

i and j are cells of a frame. dt is an offset in frames; dy and dx are offsets in cells, kept as shares of the frame, so that
half a frame stays half a frame at another size. key_place carries absolute sinks (a first frame, a corner that all look at),
query_place what is left per query. The three parts are fitted so that their sums over equal offsets, over the queries of each
key and over the keys of each query are those that were measured: iterative proportional fitting (Deming and Stephan 1940) of a
log-linear model, for which these sums are all that has to be recorded.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_ROUNDS = 12


@dataclass(frozen=True)
class CellGrid:
    """Cells of the layout a map was made on: (frames, rows of cells, columns of cells)."""

    frames: int
    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Their number."""
        return self.frames * self.rows * self.columns

    @property
    def offset_shape(self) -> tuple[int, int, int]:
        """Distinct offsets per axis."""
        return 2 * self.frames - 1, 2 * self.rows - 1, 2 * self.columns - 1

    @property
    def offset_index(self) -> torch.Tensor:
        """Int64 [cells, cells]: flat index of the offset from query cell to key cell, in raster order."""
        place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in self.shape), indexing="ij"), -1).view(-1, 3)
        apart = place[None, :] - place[:, None] + torch.tensor(self.shape) - 1
        shape = self.offset_shape
        return (apart[..., 0] * shape[1] + apart[..., 1]) * shape[2] + apart[..., 2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """As a tuple."""
        return self.frames, self.rows, self.columns


@dataclass(frozen=True, eq=False)
class Margins:
    """Sums of one map per head: by offset [H, offsets], by key cell [H, cells], by query cell [H, cells]; float64."""

    offset: torch.Tensor
    key: torch.Tensor
    query: torch.Tensor

    def plus(self, other: "Margins") -> "Margins":
        """Both together."""
        return Margins(self.offset + other.offset, self.key + other.key, self.query + other.query)


def margins(values: torch.Tensor, grid: CellGrid) -> Margins:
    """The sums of values [H, cells, cells] >= 0, query cells by key cells in raster order."""
    values = values.double()
    index = grid.offset_index.to(values.device).flatten().expand(values.shape[0], -1)
    offsets = torch.zeros(values.shape[0], math.prod(grid.offset_shape), dtype=values.dtype, device=values.device)
    return Margins(offsets.scatter_add_(1, index, values.flatten(1)), values.sum(1), values.sum(2))


def fit(sums: Margins, grid: CellGrid, rounds: int = _ROUNDS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(relative [H, *offset_shape], key_place [H, *shape], query_place [H, *shape]), logarithms in float32.

    One head after the other, so that only one map of cells x cells is there at a time.
    """
    index = grid.offset_index.flatten()
    parts = [_fit_head(sums.offset[h], sums.key[h], sums.query[h], index, rounds) for h in range(sums.key.shape[0])]
    relative, key, query = (torch.stack(p).clamp_min(1e-30).log().float() for p in zip(*parts))
    return relative.unflatten(1, grid.offset_shape), key.unflatten(1, grid.shape), query.unflatten(1, grid.shape)


def _fit_head(
    offset: torch.Tensor, key: torch.Tensor, query: torch.Tensor, index: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cells, tiny = key.numel(), 1e-30
    r, a, b = torch.ones_like(offset), torch.ones_like(key), torch.ones_like(query)
    for _ in range(rounds):
        model = r[index].view(cells, cells) * a * b[:, None]
        r = r * offset / torch.zeros_like(offset).index_add_(0, index, model.flatten()).clamp_min(tiny)
        model = r[index].view(cells, cells) * a * b[:, None]
        a = a * key / model.sum(0).clamp_min(tiny)
        model = r[index].view(cells, cells) * a * b[:, None]
        b = b * query / model.sum(1).clamp_min(tiny)
    return r, a, b


def predict(
    relative: torch.Tensor,
    key_place: torch.Tensor,
    query_place: torch.Tensor,
    grid: CellGrid,
    places: torch.Tensor,
    frames: int,
) -> torch.Tensor:
    """Logarithm of the value of each pair of cells of another layout, float32 [H, N, N].

    places: [N, 3], centre of each cell: frame (a number from 0), and row and column as shares of the frame in (0, 1). frames:
    of that layout. Between the recorded places the logarithm is interpolated; farther offsets count as the farthest recorded.
    Absolute frames count from the start in the first half of the clip and from the end in the second.
    """
    size = torch.tensor([1.0, grid.rows, grid.columns], dtype=torch.float32)
    apart = (places[None, :] - places[:, None]) * size + torch.tensor(grid.shape, dtype=torch.float32) - 1.0
    value = _sample(relative, apart)
    spot = places * size - torch.tensor([0.0, 0.5, 0.5], dtype=torch.float32)
    spot[:, 0] = _anchored(places[:, 0], frames, grid.frames)
    spot = spot[None]
    return value + _sample(key_place, spot) + _sample(query_place, spot).transpose(1, 2)


def _anchored(frame: torch.Tensor, frames: int, known: int) -> torch.Tensor:
    from_end = known - 1 - (frames - 1 - frame)
    middle = (known - 1) / 2
    return torch.where(frame < frames / 2, frame.clamp(max=middle), from_end.clamp(min=middle))


def _sample(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Trilinear look-up of [H, A, B, C] at fractional indices [M, N, 3]: [H, M, N]; ends are repeated."""
    shape = torch.tensor(table.shape[1:], dtype=torch.float32)
    # grid_sample counts the last axis first and wants -1..1 between the outermost entries
    spot = torch.where(shape > 1, 2 * index / (shape - 1).clamp_min(1) - 1, 0.0).flip(-1)
    found = F.grid_sample(table.float()[None], spot[None, :, :, None], align_corners=True, padding_mode="border")
    return found[0, ..., 0]
