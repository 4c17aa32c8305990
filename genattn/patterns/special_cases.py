"""Attention patterns with a name of their own that are settings of generalized neighborhood attention.

    sliding_window   stride 1                         NA, arXiv 2204.07143
    dilated_window   stride 1, dilation > 1           DiNA, arXiv 2209.15001
    blocked          stride = window                  window self-attention as in Swin, arXiv 2103.14030
    sliding_tile     stride = tile, window = n tiles  STA, arXiv 2502.04507; n odd

A ragged last block takes the last `window` tokens (it overlaps the one before) instead of padding.
"""

from collections.abc import Sequence

from genattn.errors import GenAttnError
from genattn.patterns.neighborhood import NeighborhoodPattern

Size = int | Sequence[int]


def sliding_window(window_size: Size, is_causal: bool | Sequence[bool] = False) -> NeighborhoodPattern:
    """Each query in the middle of its own window, -1 for a full axis."""
    return NeighborhoodPattern(window_size, is_causal=is_causal)


def dilated_window(window_size: Size, dilation: Size) -> NeighborhoodPattern:
    """Sliding windows whose keys stand `dilation` tokens apart."""
    return NeighborhoodPattern(window_size, dilation=dilation)


def blocked(window_size: Size) -> NeighborhoodPattern:
    """Windows that do not overlap: every token of a block sees the block."""
    stride = window_size if isinstance(window_size, int) else tuple(max(1, w) for w in window_size)
    return NeighborhoodPattern(window_size, stride=stride)


def sliding_tile(tile: Sequence[int], tiles: Sequence[int]) -> NeighborhoodPattern:
    """Windows of `tiles` whole tiles around the query's own tile, one odd count per axis.

    Raises GenAttnError for even counts, which have no middle tile.
    """
    if len(tile) != len(tiles) or any(n < 1 or n % 2 == 0 for n in tiles):
        nearest = tuple(max(1, n - 1 + n % 2) for n in tiles)
        raise GenAttnError(
            f"sliding_tile needs an odd number of tiles per axis of {tuple(tile)}, got {tuple(tiles)}; try {nearest}"
        )
    return NeighborhoodPattern(tuple(t * n for t, n in zip(tile, tiles)), stride=tuple(tile), tile=tuple(tile))
