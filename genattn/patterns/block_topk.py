"""Content-adaptive blocks: each query tile keeps the key tiles that its pooled queries and keys point to.

    one mean per key tile, all tiles       ->  keep 4 k of them
    means of its halves, those tiles only  ->  keep 2 k             ->  ...  ->  keep k tiles per query tile

Pooling tiles to their mean and picking by softmax mass is SpargeAttn's selector (Zhang et al., arXiv 2502.18137, section 3.3);
looking closer only where the coarse look was promising is HiP's (Lee et al., arXiv 2406.09827). Tiles whose keys do not
resemble each other are badly described by their mean and may be kept always. Text is always seen and sees all.
Unlike the static patterns the mask depends on the tensors: `plan_for(query, key, layout)`, not `plan(layout)`.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

import torch

from genattn.errors import GenAttnError
from genattn.geometry.tiles import best_box, cell_tiles, empty_raster, query_key_tiles
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.patterns.pattern import Pattern

_CHUNK = 32_000_000


@dataclass(frozen=True)
class BlockTopK(Pattern):
    """Settings of the selector.

    keep: share of the key tiles per query tile, in (0, 1]. min_similarity: key tiles whose mean cosine to their own mean is
    below this are kept for all queries; 0 turns it off. levels: how often candidate tiles are halved and looked at again.
    """

    keep: float = 0.25
    min_similarity: float = 0.0
    levels: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise GenAttnError(f"keep must be a share in (0, 1], got {self.keep}")
        if not 0 <= self.min_similarity <= 1:
            raise GenAttnError(f"min_similarity must be in [0, 1], got {self.min_similarity}; 0 turns it off")
        if self.levels < 0 or self.levels > 8:
            raise GenAttnError(f"levels must be between 0 and 8, got {self.levels}")

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Not defined without tensors."""
        _needs_tensors()

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """Not defined without tensors."""
        _needs_tensors()

    def mask(self, layout: TokenLayout) -> torch.Tensor:
        """Not defined without tensors."""
        _needs_tensors()

    @torch.no_grad()
    def plan_for(
        self, query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, block_q: int = 128, block_k: int = 128
    ) -> BlockPlan:
        """The plan for these queries [B, S, H, D] and keys [B, S, Hk, D]: lists per head, scores averaged over the batch.

        Raises GenAttnError if the tensors do not fit the layout.
        """
        heads, groups = query.shape[2], key.shape[2]
        if query.shape[1] != layout.seqlen or key.shape[1] != layout.seqlen or heads % groups:
            raise GenAttnError(
                f"query and key must be [B, {layout.seqlen}, H, D] with H a multiple of key heads, "
                f"got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        query_tiles, key_tiles = (t.to(query.device) for t in _tiles(layout, block_q, block_k))
        pooled_q = _pool(query, query_tiles, 1)[0][..., 0, :]
        listed = _unlike(key, key_tiles, self.min_similarity).repeat_interleave(heads // groups, dim=0)[:, None, :]
        mass = self._mass(pooled_q / math.sqrt(query.shape[-1]), key, key_tiles).mean(0)
        listed = listed | _top(mass, self._count(key_tiles))
        text = (layout.raster_index < 0).to(query.device)
        listed |= _holds(key_tiles, text)[None, None, :] | _holds(query_tiles, text)[None, :, None]
        listed |= _shares_tokens(query_tiles, key_tiles, layout.seqlen)[None]
        return _plan_of(listed, query_tiles, key_tiles, layout.seqlen)

    def _count(self, key_tiles: torch.Tensor) -> int:
        return max(1, math.ceil(self.keep * key_tiles.shape[0]))

    def _mass(self, pooled_q: torch.Tensor, key: torch.Tensor, key_tiles: torch.Tensor) -> torch.Tensor:
        """Softmax mass per key tile [B, H, NQ, NK]; tiles that were left behind at a coarser look have none."""
        repeats = pooled_q.shape[1] // key.shape[2]
        pooled_k = _pool(key, key_tiles, 1)[0].repeat_interleave(repeats, dim=1)
        scores = torch.einsum("bhqd,bhkd->bhqk", pooled_q, pooled_k[..., 0, :])
        alive = torch.ones_like(scores, dtype=torch.bool)
        for level in range(1, self.levels + 1):
            wanted = self._count(key_tiles) * 2 ** (self.levels - level + 1)
            if wanted < key_tiles.shape[0]:
                alive = _top(scores.masked_fill(~alive, -torch.inf), wanted)
            pooled_k, used = _pool(key, key_tiles, 2**level)
            scores = _look_closer(pooled_q, pooled_k.repeat_interleave(repeats, dim=1), used, alive)
        return scores.masked_fill(~alive, -torch.inf).softmax(-1)


def _needs_tensors() -> NoReturn:
    raise GenAttnError("BlockTopK looks at the queries and keys; call plan_for(query, key, layout), or attention(...)")


def _tiles(layout: TokenLayout, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Near-square boxes of a frame, so that one mean describes a tile well."""
    if layout.grid is None:
        return query_key_tiles(layout, empty_raster(block_q), empty_raster(block_k))
    frames, height, width = layout.grid3
    raster = [cell_tiles((frames, height, width), best_box(height, width, block), block) for block in (block_q, block_k)]
    return query_key_tiles(layout, raster[0], raster[0] if block_q == block_k else raster[1])


def _pool(x: torch.Tensor, tiles: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean over each of `parts` pieces of each tile [B, H, N, parts, D] in float32, whether it has tokens [N, parts])."""
    rows = torch.nn.functional.pad(tiles, (0, -tiles.shape[1] % parts), value=-1).long().view(len(tiles), parts, -1)
    used = rows >= 0
    gathered = x.transpose(1, 2).float()[:, :, rows.clamp_min(0).flatten()].unflatten(2, rows.shape)
    return (gathered * used[..., None]).sum(-2) / used.sum(-1).clamp_min(1)[..., None], used.any(-1)


def _unlike(key: torch.Tensor, tiles: torch.Tensor, least: float) -> torch.Tensor:
    """Bool [Hk, N]: tiles whose tokens are, in some sample, less like their mean than `least` (mean cosine)."""
    if least == 0:
        return torch.zeros(key.shape[2], len(tiles), dtype=torch.bool, device=key.device)
    used = tiles >= 0
    gathered = key.transpose(1, 2).float()[:, :, tiles.long().clamp_min(0).flatten()].unflatten(2, tiles.shape)
    mean = _pool(key, tiles, 1)[0]
    cosine = torch.nn.functional.cosine_similarity(gathered, mean, dim=-1)
    return ((cosine * used).sum(-1) / used.sum(-1) < least).any(0)


def _look_closer(query: torch.Tensor, parts: torch.Tensor, used: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Scores [B, H, NQ, NK] of the tiles in `alive` from their pieces: log of the mean of exp over the pieces."""
    scores = torch.full(alive.shape, -torch.inf, device=query.device)
    count = int(alive.sum(-1).max())
    tiles = alive.to(torch.uint8).topk(count, dim=-1).indices
    batch, head = (torch.arange(n, device=query.device) for n in alive.shape[:2])
    step = max(1, _CHUNK // max(1, math.prod(alive.shape[:2]) * count * math.prod(parts.shape[-2:])))
    for first in range(0, alive.shape[2], step):
        some = tiles[:, :, first : first + step]
        pieces = parts[batch[:, None, None, None], head[None, :, None, None], some]
        fine = torch.einsum("bhqd,bhqkpd->bhqkp", query[:, :, first : first + step], pieces)
        fine = fine.masked_fill(~used[some], -torch.inf).logsumexp(-1) - used.sum(-1).log()[some]
        scores[:, :, first : first + step].scatter_(-1, some, fine)
    return scores


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    """Bool like `values`: the `count` largest of each row."""
    hit = torch.zeros_like(values, dtype=torch.bool)
    return hit.scatter_(-1, values.topk(min(count, values.shape[-1]), dim=-1).indices, True)


def _holds(tiles: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Bool [N]: tiles that hold a wanted token."""
    return (wanted[tiles.long().clamp_min(0)] & (tiles >= 0)).any(1)


def _shares_tokens(query_tiles: torch.Tensor, key_tiles: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Bool [NQ, NK]: tile pairs with a token in common, so that every query sees its own place."""
    home = torch.full((seqlen,), -1, dtype=torch.int64, device=key_tiles.device)
    lane = key_tiles >= 0
    home[key_tiles[lane].long()] = torch.arange(len(key_tiles), device=home.device).repeat_interleave(lane.sum(1))
    shared = torch.zeros(len(query_tiles), len(key_tiles) + 1, dtype=torch.bool, device=home.device)
    target = torch.where(query_tiles >= 0, home[query_tiles.long().clamp_min(0)], -1)
    shared.scatter_(1, torch.where(target < 0, len(key_tiles), target), True)
    return shared[:, :-1]


def _plan_of(listed: torch.Tensor, query_tiles: torch.Tensor, key_tiles: torch.Tensor, seqlen: int) -> BlockPlan:
    visits = listed.sum(-1)
    ends = visits.flatten().cumsum(0).view_as(visits)
    ptr = torch.cat([ends[:, :1] - visits[:, :1], ends], dim=1).to(torch.int32)
    columns = listed.nonzero()[:, 2].to(torch.int32)
    return BlockPlan(query_tiles, key_tiles, ptr, columns, visits.to(torch.int32), None, seqlen, seqlen)
