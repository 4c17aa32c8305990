"""Parts of a key tile by likeness: which of its keys share a pseudo-key under "mean2".

A tile is a box of the grid, and a box often holds an object and its background. Halves by place mix both. Here the keys of a
tile are sorted along the direction in which they differ most (their first principal component, by one step of power iteration
from the key farthest from the mean) and the sorted run is cut into parts of equal size, per sample and key head. Equal sizes
keep the weights of the parts the same for all heads.

On a CPU the coordinates are computed in float64 and rounded to float32 before they are sorted, so that all backends average the
same keys; on a GPU in float32. The choice is not differentiated: a gradient flows through the means.
"""

import torch

from genattn.kernels.plan.tail import Tail

# what a processor's cache holds; a GPU is kept busy instead
_AT_ONCE = {"cpu": 1 << 18}
_ON_OTHERS = 1 << 24
_LAST = torch.finfo(torch.float32).max


def parts_by_likeness(key: torch.Tensor, tail: Tail, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Int32 [B, Hk, P, L]: the tokens of each part of `tail`; see `parts_of_tiles`."""
    return parts_of_tiles(key, tail.tokens.view(-1, tail.parts * tail.tokens.shape[1]), tail.parts, key_mask)


@torch.no_grad()
def parts_of_tiles(key: torch.Tensor, tiles: torch.Tensor, parts: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Int32 [B, Hk, NT * parts, ceil(M / parts)]: the tokens of each part of each tile, -1 marks an unused lane.

    key [B, Sk, Hk, D]; tiles int [NT, M], -1 unused; key_mask bool [B, Sk], False leaves a key out. A tile with n keys that
    count is cut after n / parts, 2 n / parts, ... of them, rounded up.
    """
    tiles = torch.nn.functional.pad(tiles, (0, -tiles.shape[1] % parts), value=-1)
    key = key.contiguous()  # once, not for every gather
    limit = _AT_ONCE.get(key.device.type, _ON_OTHERS)
    at_once = max(1, limit // max(1, key[:, 0].numel() * tiles.shape[1]))
    return torch.cat([_parts(key, some, parts, key_mask) for some in tiles.to(torch.int32).split(at_once)], 2)


def rows_by_head(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, Hk, ..., D], contiguous: the rows `tokens`, int64 [B or 1, Hk or 1, ...], of x [B, S, Hk, D].

    Who asks often has x contiguous: it is copied here otherwise.
    """
    batch, seqlen, heads, dim = x.shape
    shape = (batch, heads, *tokens.shape[2:])
    later = (1,) * (tokens.dim() - 2)
    sample = torch.arange(batch, device=x.device).view(-1, 1, *later)
    head = torch.arange(heads, device=x.device).view(-1, *later)
    index = (tokens + sample * seqlen) * heads + head
    return x.reshape(-1, dim).index_select(0, index.flatten()).view(*shape, dim)


def _parts(key: torch.Tensor, lanes: torch.Tensor, parts: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """The same for some tiles, lanes int32 [T, M]."""
    # an unused lane takes the tile's first token, whose row weighs nothing there
    index = lanes.where(lanes >= 0, lanes[:, :1]).long().clamp_min(0)
    used = (lanes >= 0)[None] if key_mask is None else (lanes >= 0) & key_mask[:, index]
    rows = rows_by_head(key, index[None, None]).to(torch.float64 if key.device.type == "cpu" else torch.float32)
    if key_mask is not None:  # no weight undoes a NaN
        rows = rows.masked_fill(~used[:, None, ..., None], 0.0)
    place = _along_the_spread(rows, used[:, None]).float().nan_to_num(nan=_LAST, posinf=_LAST)
    place = place.masked_fill(~used[:, None], torch.inf).argsort(dim=-1, stable=True)
    count = used.sum(-1)[:, None, :, None]
    first = -(-torch.arange(parts + 1, device=key.device) * count // parts)
    rank = first[..., :-1, None] + torch.arange(lanes.shape[1] // parts, device=key.device)
    inside = rank < first[..., 1:, None]
    taken = place.gather(-1, rank.clamp_max(lanes.shape[1] - 1).expand(*place.shape[:3], -1, -1).flatten(-2))
    tokens = lanes.expand(*place.shape[:2], -1, -1).gather(-1, taken).unflatten(-1, (parts, -1))
    return tokens.masked_fill(~inside, -1).flatten(2, 3)


def _along_the_spread(rows: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """[..., M]: the coordinate of each of the rows [..., M, D] along their first principal component; used bool [..., M].

    Rows that are not used must be finite; their coordinate is undefined.
    """
    # products of a single row are several times faster than those of a single column
    centre = (used.to(rows.dtype)[..., None, :] @ rows) / used.sum(-1).clamp_min(1)[..., None, None]
    away = (rows - centre).square().sum(-1).masked_fill(~used, -1.0)
    farthest = rows.take_along_dim(away.argmax(-1)[..., None, None], -2)
    direction = _of_length_one(farthest - centre)
    along = ((direction @ rows.mT) - (direction * centre).sum(-1, keepdim=True)).masked_fill(~used[..., None, :], 0.0)
    direction = _of_length_one(along @ rows - along.sum(-1, keepdim=True) * centre)
    return ((direction @ rows.mT) - (direction * centre).sum(-1, keepdim=True))[..., 0, :]


def _of_length_one(direction: torch.Tensor) -> torch.Tensor:
    return direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-20)
