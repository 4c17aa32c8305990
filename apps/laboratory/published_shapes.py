"""Shapes and figures of the papers' tables that geometry alone can answer.

Radial: arXiv 2506.19852, tables 1 and 2. Neighborhood: arXiv 2504.16922, the simulator's table.
"""

from dataclasses import dataclass
from typing import Literal

from genattn.planning.simulate import Simulation, simulate


@dataclass(frozen=True)
class PublishedSparsity:
    """One row of Radial's tables: tokens per axis (frames, rows, columns), share of the scores left out, in percent."""

    name: str
    grid: tuple[int, int, int]
    percent: float
    model: Literal["wan", "hunyuan"] = "wan"


# all released masks had the first frame as sink when the paper was written, HunyuanVideo's too
SPARSITIES = (
    PublishedSparsity("HunyuanVideo 253 frames", (64, 45, 80), 80.8),
    PublishedSparsity("HunyuanVideo 509 frames", (128, 45, 80), 88.3),
    PublishedSparsity("Mochi 331 frames", (56, 30, 53), 76.4),
    PublishedSparsity("Mochi 667 frames", (112, 30, 53), 85.5),
    PublishedSparsity("Wan2.1-14B 161 frames", (41, 45, 80), 73.6),
)


@dataclass(frozen=True)
class PublishedBound:
    """One row of the simulator's table.

    share: attention's part of a run. end_to_end: NATTENSim's bound for the run. b200: what the authors measured there.
    """

    model: str
    share: float
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    tile_q: tuple[int, ...]
    tile_k: tuple[int, ...]
    end_to_end: float
    b200: float

    def simulate(self) -> Simulation:
        """The same by our simulator."""
        return simulate(self.grid, self.window, self.stride, tile_q=self.tile_q, tile_k=self.tile_k, attention_share=self.share)


def _rows(
    model: str,
    share: float,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    tiles: tuple[tuple[int, ...], tuple[int, ...]],
    found: tuple[tuple[tuple[int, ...], float, float], ...],
) -> list[PublishedBound]:
    return [PublishedBound(model, share, grid, window, stride, *tiles, bound, b200) for stride, bound, b200 in found]


# the paper states tiles for HunyuanVideo 18x24x24 only; those of the others are the shipped pair that fits best
BOUNDS = (
    *_rows("HunyuanVideo", 0.607, (30, 48, 80), (18, 24, 24), ((4, 8, 8), (2, 8, 8)), (
        ((1, 1, 1), 1.73, 1.73), ((2, 1, 1), 1.78, 1.77), ((1, 1, 8), 1.99, 1.95), ((2, 1, 8), 2.02, 1.98),
        ((1, 8, 8), 2.17, 2.09), ((2, 8, 8), 2.20, 2.11), ((16, 8, 8), 2.23, 2.23), ((18, 24, 24), 2.06, 2.00),
    )),
    *_rows("HunyuanVideo", 0.607, (30, 48, 80), (30, 40, 40), ((2, 16, 8), (2, 8, 8)), (
        ((1, 1, 1), 1.21, 1.15), ((1, 1, 8), 1.44, 1.26), ((1, 32, 8), 1.55, 1.53), ((30, 40, 40), 1.44, 1.28),
    )),
    *_rows("FLUX 4K", 0.518, (256, 256), (80, 80), ((16, 16), (16, 8)), (
        ((1, 1), 1.76, 1.65), ((16, 1), 1.84, 1.72), ((16, 16), 1.88, 1.82),
    )),
    *_rows("Cosmos-7B", 0.587, (16, 44, 80), (16, 24, 16), ((8, 4, 8), (4, 4, 8)), (
        ((1, 1, 1), 1.90, 1.76), ((1, 8, 1), 1.96, 1.79), ((1, 1, 16), 2.05, 1.88), ((1, 8, 16), 2.10, 2.05),
    )),
    *_rows("Cosmos-7B", 0.587, (16, 44, 80), (16, 32, 48), ((8, 4, 8), (4, 4, 8)), (
        ((1, 1, 1), 1.35, 1.18), ((1, 8, 1), 1.42, 1.20), ((1, 1, 16), 1.42, 1.21), ((1, 8, 16), 1.50, 1.46),
    )),
)  # fmt: skip
