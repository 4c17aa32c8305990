"""What is kept whatever the rule says: tiles that their mean describes badly, the own place, what a window always needs."""

from dataclasses import dataclass
from typing import Literal

import torch

from genattn.selection.pooling import likeness_among, likeness_to_mean
from genattn.settings import flag, number, one_of


@dataclass(frozen=True)
class Similarity:
    """Key tiles whose tokens resemble each other less than `least` in [-1, 1] are kept for all queries.

    of: "mean", the mean cosine to the tile's mean, or "pairs", over all pairs of its tokens (SpargeAttn). centred: take the
    mean of all keys off first, as SpargeAttn's smoothing does. queries: query tiles of that kind see everything. shut: the
    kept tiles take no part in the rule's softmax.
    """

    least: float = 0.5
    of: Literal["mean", "pairs"] = "mean"
    centred: bool = False
    queries: bool = False
    shut: bool = False

    def __post_init__(self) -> None:
        what = "a cosine in [-1, 1]; -1 keeps nothing in addition"
        object.__setattr__(self, "least", number("least", self.least, -1, 1, what))
        one_of("of", self.of, ("mean", "pairs"))
        for name in ("centred", "queries", "shut"):
            flag(name, getattr(self, name))

    def unlike(self, x: torch.Tensor, tiles: torch.Tensor, is_key: bool, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Bool [H, N]: tiles of x [B, S, H, D] that are too unlike in some sample; x is zero where bool [B, S] hides it."""
        if is_key and self.centred:
            mean = x.mean(1, keepdim=True)
            if key_mask is not None:
                mean = mean * (key_mask.shape[1] / key_mask.sum(1).clamp_min(1))[:, None, None, None].to(mean.dtype)
            x = x - mean
        measure = likeness_to_mean if self.of == "mean" else likeness_among
        found = measure(x, tiles)
        below = found <= self.least if self.of == "pairs" else found < self.least
        return below.any(0)


def holds(tiles: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Bool [N]: tiles that hold a wanted token; wanted bool [S]."""
    return (wanted[tiles.long().clamp_min(0)] & (tiles >= 0)).any(1)


def shares_tokens(query_tiles: torch.Tensor, key_tiles: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Bool [NQ, NK]: tile pairs with a token in common, so that every query sees its own place."""
    home = torch.full((seqlen,), -1, dtype=torch.int64, device=key_tiles.device)
    lane = key_tiles >= 0
    home[key_tiles[lane].long()] = torch.arange(len(key_tiles), device=home.device).repeat_interleave(lane.sum(1))
    shared = torch.zeros(len(query_tiles), len(key_tiles) + 1, dtype=torch.bool, device=home.device)
    target = torch.where(query_tiles >= 0, home[query_tiles.long().clamp_min(0)], -1)
    shared.scatter_(1, torch.where(target < 0, len(key_tiles), target), True)
    return shared[:, :-1]


def beside(own: torch.Tensor, grid: torch.Tensor, reach: int) -> torch.Tensor:
    """Bool like own [NQ, NK]: key tiles up to `reach` places before or after one's own; grid bool [NK], tiles of the grid."""
    wide = own.clone()
    for step in range(1, reach + 1):
        wide[:, step:] |= own[:, :-step]
        wide[:, :-step] |= own[:, step:]
    return own | (wide & grid)
