"""Neighborhood attention on boxes that follow the query tile: no alignment, no tile that is half wanted.

    query tile, 4 x 4         its keys: one box with a halo, wherever it lies
                              . . . . . . .
       q q q q                . k k k k k k
       q q q q      ->        . k k k k k k      gathered once, cut nowhere
       q q q q                . k k k k k k

Fixed key tiles visit every tile that the window touches, at unaligned windows a good part of it for nothing. Here the union
of a query tile's windows (one box, because windows move without gaps) is gathered and attended densely; where the queries of
a tile differ the element rule masks. After FNA's dynamic tiling (Hassani et al., arXiv 2403.04690). Plain tensor operations and
scaled_dot_product_attention: any device, any dtype, with backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from genattn.kernels.element_rule import ElementRule

_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """Query tiles and the box of keys of each.

    query_tiles: int32 [NQ, BQ], token indices, -1 unused. box_of_tile: int64 [NQ]. boxes: int32 [NBOX, CAP], token indices, -1
    after the last. whole: bool [NQ], every query of the tile sees all of its box. shared_keys: int32 [G], seen by all queries.
    dense_queries: int32 [R], queries that see all of `visible_keys`, int32 [V]. rule: one for all heads, decides in the others.
    """

    query_tiles: torch.Tensor
    box_of_tile: torch.Tensor
    boxes: torch.Tensor
    whole: torch.Tensor
    shared_keys: torch.Tensor
    dense_queries: torch.Tensor
    visible_keys: torch.Tensor
    rule: ElementRule
    seqlen: int

    @cached_property
    def keys_per_box(self) -> torch.Tensor:
        """Int64 [NBOX]."""
        return (self.boxes >= 0).sum(1)

    @cached_property
    def computed_density(self) -> float:
        """Scores that are computed, unused query lanes included, over S x S."""
        keys = self.keys_per_box[self.box_of_tile] + self.shared_keys.numel()
        work = int(keys.sum()) * self.query_tiles.shape[1] + self.dense_queries.numel() * self.visible_keys.numel()
        return work / self.seqlen**2

    def groups(self) -> Iterator[tuple[int, bool, torch.Tensor]]:
        """(keys in the box, whether no mask is needed, int64 query tiles) for tiles that can be computed together."""
        kind = self.keys_per_box[self.box_of_tile] * 2 + self.whole.long()
        for value in kind.unique().tolist():
            yield value // 2, bool(value % 2), torch.nonzero(kind == value).flatten()


def halo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HaloPlan,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, S, H, D]: attention of query [B, S, H, D] over key, value [B, S, Hk, D]; key_mask bool [B, S] hides keys.

    Every query must be left at least one key. Raises ValueError if the tensors do not fit the plan.
    """
    if query.shape[1] != plan.seqlen or key.shape[1] != plan.seqlen or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query and key must be [B, {plan.seqlen}, H, D] with H a multiple of key heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    out = torch.zeros_like(query)
    if plan.dense_queries.numel():
        rows = plan.dense_queries.long()[None]
        part = _attend(query, key, value, rows, plan.visible_keys.long()[None], None, scale, key_mask)
        out = out.index_copy(1, rows[0], part[:, 0])
    for keys, whole, tiles in plan.groups():
        step = max(
            1, _CHUNK_BYTES // (query.shape[0] * query.shape[2] * query.shape[3] * query.element_size() * 4 * max(1, keys))
        )
        for some in tiles.split(step):
            out = _add_tiles(out, query, key, value, plan, some, keys, whole, scale, key_mask)
    return out


def _add_tiles(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HaloPlan,
    tiles: torch.Tensor,
    keys: int,
    whole: bool,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    lanes = plan.query_tiles[tiles].long()
    rows = torch.where(lanes >= 0, lanes, lanes[:, :1])
    shared = plan.shared_keys.long().expand(len(tiles), -1)
    columns = torch.cat([shared, plan.boxes[plan.box_of_tile[tiles], :keys].long()], dim=1)
    mask = None if whole else plan.rule(rows[:, :, None], columns[:, None, :])[0]
    part = _attend(query, key, value, rows, columns, mask, scale, key_mask)
    used = lanes >= 0
    return out.index_copy(1, lanes[used], part[:, used])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Queries `rows` [m, BQ] over keys `columns` [m, n]; mask bool [m, BQ, n]. [B, m, BQ, H, D]."""
    batch = query.shape[0]
    pairs = ((query, rows), (key, columns), (value, columns))
    q, k, v = (x[:, index].flatten(0, 1).transpose(1, 2) for x, index in pairs)
    mask = None if mask is None else mask[None].expand(batch, -1, -1, -1)
    if key_mask is not None:
        seen = key_mask[:, columns][:, :, None, :].expand(-1, -1, rows.shape[1], -1)
        mask = seen if mask is None else mask & seen
    mask = None if mask is None else mask.flatten(0, 1)[:, None]
    grouped = query.shape[2] != key.shape[2]
    part = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return part.transpose(1, 2).unflatten(0, (batch, -1))
