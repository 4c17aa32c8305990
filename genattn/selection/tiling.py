"""Which tokens make up a tile: boxes of a frame, runs of the sequence, or clusters of tokens that resemble each other."""

import numbers
from dataclasses import dataclass

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.tiles import best_box, cell_tiles, empty_raster, query_key_tiles, run_raster
from genattn.geometry.token_layout import TokenLayout
from genattn.settings import refuse, whole_number, whole_numbers


@dataclass(frozen=True)
class Boxes:
    """Near-square boxes of a frame, so that one mean describes a tile well. block: tokens per (query, key) tile, or None."""

    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _block(self.block))

    def tiles(self, layout: TokenLayout, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(query tiles, key tiles), int32 [n, block] token indices; block_q, block_k hold where the settings name none."""
        block_q, block_k = self.block or (block_q, block_k)
        if layout.grid is None:
            return query_key_tiles(layout, empty_raster(block_q), empty_raster(block_k))
        frames, height, width = layout.grid3
        made = [cell_tiles((frames, height, width), best_box(height, width, block), block) for block in (block_q, block_k)]
        return query_key_tiles(layout, made[0], made[0] if block_q == block_k else made[1])


@dataclass(frozen=True)
class Runs:
    """Runs of the grid in raster order, as the published kernels cut the sequence; text stands in tiles of its own."""

    block: tuple[int, int] | None = (64, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _block(self.block))

    def tiles(self, layout: TokenLayout, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See Boxes.tiles."""
        block_q, block_k = self.block or (block_q, block_k)
        total = int(np.prod(layout.grid3))
        runs = [run_raster(total, block) for block in (block_q, block_k)]
        return query_key_tiles(layout, runs[0], runs[0] if block_q == block_k else runs[1])


@dataclass(frozen=True)
class Clusters:
    """K-means clusters per head over the grid's queries and, apart, over its keys.

    query, key: clusters; None takes as many as there would be tiles. iterations: of the first clustering; step_iterations: of
    later ones in the same run, which start from the centres of the step before (SVG2). sample: all rounds but the last look at
    every sample-th token alone, while that leaves 16 for each cluster.
    """

    query: int | None = None
    key: int | None = None
    iterations: int = 10
    step_iterations: int = 2
    sample: int = 4

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            value = getattr(self, name)
            if value is not None:
                value = whole_number(f"clusters of {name}", value, 1, "a whole number >= 1 or None")
                object.__setattr__(self, name, value)
        for name, usual in (("iterations", 10), ("step_iterations", 2), ("sample", 4)):
            value = whole_number(name, getattr(self, name), 1, f"a whole number >= 1; {usual} is usual")
            object.__setattr__(self, name, value)

    def stride(self, tokens: int, clusters: int) -> int:
        """Which tokens the rounds before the last look at: every stride-th."""
        return max(1, min(self.sample, tokens // (16 * clusters)))

    def counts(self, tokens: int, block_q: int = 128, block_k: int = 128) -> tuple[int, int]:
        """(query clusters, key clusters) for a grid of `tokens`. Raises GenAttnError for more clusters than tokens.

        block_q, block_k: tokens per tile, for settings that name no number.
        """
        for name, wanted in (("query", self.query), ("key", self.key)):
            if wanted is not None and wanted > tokens:
                raise GenAttnError(f"clusters of {name} must be at most the {tokens} tokens of the grid, got {wanted}")
        return self.query or max(1, tokens // block_q), self.key or max(1, tokens // block_k)


Tiling = Boxes | Runs | Clusters
TILINGS: dict[str, type[Boxes] | type[Runs] | type[Clusters]] = {"boxes": Boxes, "runs": Runs, "clusters": Clusters}


def tiling_named(name: str) -> Tiling:
    """The tiling called `name` with its default settings. Raises GenAttnError that lists the names."""
    if not isinstance(name, str) or name not in TILINGS:
        raise GenAttnError(f"tiles must be one of {', '.join(TILINGS)} or a tiling object, got {name!r}")
    return TILINGS[name]()


def _block(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    what = "tokens per tile >= 1, one number or (query, key)"
    sides = (value, value) if isinstance(value, numbers.Integral) else whole_numbers("block", value, 1, what)
    if len(sides) != 2:
        raise refuse("block", value, what)
    query, key = (whole_number("block", side, 1, what) for side in sides)
    return query, key
