"""What is known of a tile without looking at its tokens one by one: mean, spread, likeness.

A tile is a row of token indices, -1 for unused lanes. Tensors are heads-last [B, S, H, D]; results are [B, H, N, ...] in
float32, or float64 for float64 input.
"""

import torch

from genattn.kernels.reference.likeness import parts_of_tiles
from genattn.kernels.reference.tail import means_of_parts

_ELEMENTS_AT_ONCE = 1 << 25


def tile_means(x: torch.Tensor, tiles: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Mean of each of `parts` runs of lanes of each tile: [B, H, N, parts, D]; zero where a run holds no token.

    x [B, S, H, D]; tiles int [N, L].
    """
    rows = _runs(tiles, parts)
    used = (rows >= 0).to(_compute(x))
    # one gather of whole rows, then a product with the lanes: no copy of x with the heads in front
    weight = used / used.sum(-1, keepdim=True).clamp_min(1)
    index = rows.clamp_min(0).flatten(1)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, x.shape[0] * x.shape[2] * x.shape[3] * index.shape[1]))
    found = []
    for some, lanes in zip(index.split(step), weight.split(step)):
        gathered = x[:, some.flatten()].to(weight.dtype).unflatten(1, (*lanes.shape,))
        found.append(torch.einsum("bnplhd,npl->bhnpd", gathered, lanes))
    return torch.cat(found, dim=2)


def tile_variances(x: torch.Tensor, tiles: torch.Tensor, halves: bool = False) -> torch.Tensor:
    """Variance of each channel over the tokens of a tile (divided by their number): [B, H, N, D].

    halves: around the means of the two halves of like tokens that stand in for a tile under "mean2".
    """
    mean = tile_means(x, tiles)[..., 0, :]
    square = tile_means(x.to(mean.dtype).square(), tiles)[..., 0, :]
    if not halves:
        return (square - mean.square()).clamp_min(0)
    parts = parts_of_tiles(x, tiles, 2)
    tokens = (parts[:, 0] >= 0).sum(-1).to(mean.dtype)  # the same in every head
    means = means_of_parts(x, parts, tokens).transpose(1, 2).unflatten(2, (-1, 2))
    number = tokens.unflatten(1, (-1, 2))
    weight = number / number.sum(-1, keepdim=True).clamp_min(1)
    return (square - (weight[:, None, ..., None] * means.square()).sum(3)).clamp_min(0)


def lanes_used(tiles: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Int64 [N, parts]: tokens in each run of lanes of each tile."""
    return (_runs(tiles, parts) >= 0).sum(-1)


def likeness_to_mean(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the tokens of a tile and their mean, [B, H, N]."""
    mean = torch.nn.functional.normalize(tile_means(x, tiles)[..., 0, :], dim=-1)
    unit = torch.nn.functional.normalize(x.to(mean.dtype), dim=-1)
    return (tile_means(unit, tiles)[..., 0, :] * mean).sum(-1)


def likeness_among(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of tokens of a tile, each with itself too, [B, H, N].

    SpargeAttn's self-similarity (Zhang et al., arXiv 2502.18137, section 3.3; `get_block_map_meansim` of its release): the
    mean entry of the Gram matrix of unit vectors is the squared length of their mean.
    """
    unit = torch.nn.functional.normalize(x.to(_compute(x)), dim=-1)
    return tile_means(unit, tiles)[..., 0, :].square().sum(-1)


def _compute(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _runs(tiles: torch.Tensor, parts: int) -> torch.Tensor:
    """Int64 [N, parts, lanes]: the lanes of each tile cut into runs of equal length."""
    return torch.nn.functional.pad(tiles, (0, -tiles.shape[1] % parts), value=-1).long().view(len(tiles), parts, -1)
