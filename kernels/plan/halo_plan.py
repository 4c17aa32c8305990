"""Neighborhood attention on boxes that follow the query tile: no alignment, no tile that is half wanted.

    query tile, 4 x 4         its keys: one box with a halo, wherever it lies
                              . . . . . . .
       q q q q                . k k k k k k
       q q q q      ->        . k k k k k k      gathered once, cut nowhere
       q q q q                . k k k k k k

Fixed key tiles visit every tile that the window touches, at unaligned windows a good part of it for nothing. Here the union
of a query tile's windows (one box, because windows move without gaps) is gathered and attended densely, with a mask where the
queries of a tile differ. Seen from its own box most tiles are the same tile, so the mask is one per kind of tile and the plan
holds a few numbers per axis, whatever the length of the sequence. After FNA's dynamic tiling (Hassani et al., arXiv
2403.04690). Plain tensor operations and scaled_dot_product_attention: any device, any dtype, with backward.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from genattn.kernels.plan.lasting import lasting

# gathered keys and values of the tiles that are computed together: in cache on a CPU, enough to fill a GPU
_CHUNK_BYTES = {"cpu": 8 << 20}
_CHUNK_BYTES_ELSEWHERE = 64 << 20
Axes = tuple["HaloParts", "HaloParts", "HaloParts"]


@dataclass(frozen=True, eq=False)
class HaloParts:
    """Parts of one axis that look alike from their own key range.

    rows: int64 [m, q], query coordinates of each part. keys: int64 [m, k], key coordinates. seen: bool [q, k], the same in all.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """Query tiles and their key boxes, as products over the three grid axes.

    axes: per axis its kinds of parts; a tile is one part of each axis. extent: (frames, height, width). places: int64
    [prod(extent)], token of each grid position, or None when they are the same. shared_keys: int64 [G], seen by all queries.
    dense_queries: int64 [R], queries that see all of `visible_keys`, int64 [V].
    """

    axes: tuple[tuple[HaloParts, ...], tuple[HaloParts, ...], tuple[HaloParts, ...]]
    extent: tuple[int, int, int]
    places: torch.Tensor | None
    shared_keys: torch.Tensor
    dense_queries: torch.Tensor
    visible_keys: torch.Tensor
    seqlen: int

    @property
    def density(self) -> float:
        """The same as `computed_density`: there are no lanes without a token."""
        return self.computed_density

    @cached_property
    def computed_density(self) -> float:
        """Scores that are computed over S x S."""
        boxes, queries = (
            math.prod(sum(term(part) for part in kinds) for kinds in self.axes)
            for term in (lambda p: p.rows.numel() * p.keys.shape[1], lambda p: p.rows.numel())
        )
        work = boxes + queries * self.shared_keys.numel() + self.dense_queries.numel() * self.visible_keys.numel()
        return work / self.seqlen**2

    def kinds(self) -> Iterator[tuple[Axes, torch.Tensor | None]]:
        """(parts of each axis, mask) for tiles that can be computed together; mask bool [queries, keys], None if all is seen.

        The columns of the mask are the shared keys, then the box in raster order.
        """
        for parts in itertools.product(*self.axes):
            if all(bool(part.seen.all()) for part in parts):
                yield parts, None
                continue
            frames, rows, columns = (part.seen for part in parts)
            seen = frames[:, None, None, :, None, None] & rows[None, :, None, None, :, None] & columns[:, None, None, :]
            seen = seen.flatten(3).flatten(0, 2)
            yield parts, torch.cat([seen.new_ones(len(seen), self.shared_keys.numel()), seen], dim=1)

    def tokens(self, coordinates: list[torch.Tensor]) -> torch.Tensor:
        """Int64 [m, n0 * n1 * n2]: tokens of the boxes whose coordinates per axis are [m, n0], [m, n1], [m, n2]."""
        frames, rows, columns = coordinates
        line = frames[:, :, None] * self.extent[1] + rows[:, None, :]
        index = (line[..., None] * self.extent[2] + columns[:, None, None, :]).flatten(1)
        return index if self.places is None else self.places[index]

    def to(self, device: torch.device | str) -> "HaloPlan":
        """The plan with its tensors on `device`; the copy is kept."""
        device = torch.empty(0, device=device).device
        if device == self.shared_keys.device:
            return self
        if device not in self._copies:
            self._copies[device] = self._copy_to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, "HaloPlan"]:
        return {}

    @cached_property
    def cache(self) -> dict[str, object]:
        """Room for what a backend derives from this plan once."""
        return {}

    @lasting
    def _copy_to(self, device: torch.device) -> "HaloPlan":
        axes = tuple(tuple(HaloParts(*(t.to(device) for t in vars(p).values())) for p in kinds) for kinds in self.axes)
        places = None if self.places is None else self.places.to(device)
        shared, dense, visible = (t.to(device) for t in (self.shared_keys, self.dense_queries, self.visible_keys))
        return HaloPlan(axes, self.extent, places, shared, dense, visible, self.seqlen)  # type: ignore[arg-type]


def halo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HaloPlan,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, S, H, D]: attention of query [B, S, H, D] over key, value [B, S, Hk, D]; key_mask bool [B, S] hides keys,
    which may then hold anything. A query that is left none gets zeros. Raises ValueError if the tensors do not fit the plan.
    """
    check_halo_inputs(query, key, plan)
    plan = plan.to(query.device)
    out = torch.zeros_like(query)
    if key_mask is not None:  # a hidden key must not leak through 0 * NaN
        key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
    if plan.dense_queries.numel():
        rows = plan.dense_queries[None]
        part = _attend(query, key, value, rows, plan.visible_keys[None], None, scale, key_mask)
        out.index_copy_(1, rows[0], part[:, 0])
    for parts, mask in plan.kinds():
        for rows, columns in _chunks(plan, parts, query):
            part = _attend(query, key, value, rows, columns, mask, scale, key_mask)
            out.index_copy_(1, rows.flatten(), part.flatten(1, 2))
    return out


def check_halo_inputs(query: torch.Tensor, key: torch.Tensor, plan: HaloPlan) -> None:
    """Raise ValueError unless the tensors fit the plan."""
    if query.shape[1] != plan.seqlen or key.shape[1] != plan.seqlen or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query and key must be [B, {plan.seqlen}, H, D] with H a multiple of key heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )


def _chunks(plan: HaloPlan, parts: Axes, query: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(queries [m, q], keys [m, k]) of a few tiles at a time."""
    keys = plan.shared_keys.numel() + math.prod(part.keys.shape[1] for part in parts)
    bytes_each = 2 * query.shape[0] * query.shape[2] * query.shape[3] * query.element_size() * max(1, keys)
    step = max(1, _CHUNK_BYTES.get(query.device.type, _CHUNK_BYTES_ELSEWHERE) // bytes_each)
    counts = tuple(len(part.rows) for part in parts)
    for some in torch.arange(math.prod(counts), device=query.device).split(step):
        place = torch.unravel_index(some, counts)
        rows = plan.tokens([part.rows[p] for part, p in zip(parts, place)])
        boxes = plan.tokens([part.keys[p] for part, p in zip(parts, place)])
        yield rows, torch.cat([plan.shared_keys.expand(len(some), -1), boxes], dim=1)


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
    """Queries `rows` [m, q] over keys `columns` [m, n]; mask bool [q, n] for all m. [B, m, q, H, D]."""
    batch = query.shape[0]
    pairs = ((query, rows), (key, columns), (value, columns))
    q, k, v = (x[:, index].flatten(0, 1).transpose(1, 2) for x, index in pairs)
    if key_mask is not None:
        seen = key_mask[:, columns].flatten(0, 1)[:, None, None, :].expand(-1, -1, rows.shape[1], -1)
        mask = seen if mask is None else mask & seen
    grouped, empty = query.shape[2] != key.shape[2], None
    if mask is not None and key_mask is not None:  # a row that sees nothing is NaN in some backends
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty
    part = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    part = part if empty is None else part.masked_fill(empty, 0.0)
    return part.transpose(1, 2).unflatten(0, (batch, -1))
