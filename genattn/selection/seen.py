"""What counts in a choice by content where a mask hides keys: padding is no part of any mean, cluster or share.

A tile in which some keys are hidden is known by the others; a tile of hidden keys alone is not chosen. A place of the grid
that is hidden as a key is taken for padding as a query too: it speaks for its tile only where the whole tile is hidden. Text
is always seen, so a mask of text changes no choice.
"""

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout


def check_key_mask(key_mask: torch.Tensor | None, key: torch.Tensor) -> None:
    """Raise GenAttnError unless `key_mask` is None or bool [B, S] for key [B, S, Hk, D]."""
    if key_mask is not None and (key_mask.shape != key.shape[:2] or key_mask.dtype is not torch.bool):
        raise GenAttnError(f"key_mask must be bool {tuple(key.shape[:2])}, got {key_mask.dtype} {tuple(key_mask.shape)}")


def seen_places(key_mask: torch.Tensor | None, layout: TokenLayout) -> torch.Tensor | None:
    """Bool [S], False for hidden places of the grid; None where all or none of the grid is seen. key_mask: bool [B, S].

    Raises GenAttnError where the entries of the batch hide different places of the grid: they have no choice in common.
    """
    if key_mask is None:
        return None
    grid = (layout.raster_index >= 0).to(key_mask.device)
    shown = key_mask | ~grid
    if len(shown) > 1 and not bool((shown == shown[:1]).all()):
        raise GenAttnError(
            "key_mask must hide the same places of the grid in all entries of one choice, got entries that differ; "
            "choose for each entry alone"
        )
    seen = int((shown[0] & grid).sum())
    return shown[0] if 0 < seen < int(grid.sum()) else None


def without_hidden(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, S, H, D] with zeros at hidden places: what stands there may be anything."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, :, None, None], 0.0)


def seen_lanes(tiles: torch.Tensor, seen: torch.Tensor | None, or_all: bool = False) -> torch.Tensor:
    """`tiles` int [N, lanes] with -1 for hidden tokens; or_all: a tile of hidden tokens alone stays as it is."""
    if seen is None:
        return tiles
    shown = torch.where(seen.to(tiles.device)[tiles.long().clamp_min(0)], tiles, -1)
    return torch.where((shown >= 0).any(1, keepdim=True), shown, tiles) if or_all else shown
