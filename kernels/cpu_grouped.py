"""Block-sparse attention on the CPU without a compiler: one dense SDPA call per group of query tiles that share their keys.

Query tiles with the same key list form a group; its keys are gathered once, keys that none of its queries sees are dropped,
and only what is still ragged gets a mask. SDPA's own log-sum-exp comes out with it.
"""

from dataclasses import dataclass

import torch

from genattn.kernels.block_plan import BlockPlan

_MASK_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class Group:
    """Queries that are served by one call: `queries` [Lq] and `keys` [Lk] token indices, `mask` bool [Lq, Lk] or None."""

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


def why_not_grouped(query: torch.Tensor, plan: BlockPlan) -> str | None:
    """The reason why the grouped path cannot serve this call, or None."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors, got {query.device.type}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"the dtype must be a floating type that SDPA takes, got {query.dtype}"
    return None


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward only; shapes and meaning as in `reference_attention`."""
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, :, None, None], 0.0)
        value = value.masked_fill(~key_mask[:, :, None, None], 0.0)
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.zeros(query.shape, dtype=query.dtype)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
    lists = groups_of_plan(plan)
    for row, groups in enumerate(lists):
        heads = slice(None) if len(lists) == 1 else slice(row, row + 1)
        kv_heads = slice(None) if len(lists) == 1 else slice(row // group, row // group + 1)
        repeat = group if len(lists) == 1 else 1
        for part in groups:
            mask = _call_mask(part, key_mask)
            out_part, lse_part = _sdpa(
                query[:, heads, part.queries],
                key[:, kv_heads, part.keys].repeat_interleave(repeat, 1),
                value[:, kv_heads, part.keys].repeat_interleave(repeat, 1),
                mask,
                scale,
            )
            out[:, heads, part.queries] = out_part
            lse[:, heads, part.queries] = lse_part.to(lse.dtype)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias, empty = None, None
    if mask is not None:
        empty = ~mask.any(-1)
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~(mask | empty[..., None]), float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    if empty is not None and bool(empty.any()):
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
    return out, lse


def _call_mask(part: Group, key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[1 or B, 1, Lq, Lk], or None when every query of the group sees every key."""
    mask = None if part.mask is None else part.mask[None, None]
    if key_mask is None:
        return mask
    hidden = key_mask[:, None, None, part.keys].expand(-1, -1, part.queries.numel(), -1)
    if bool(hidden.all()):
        return mask
    return hidden if mask is None else mask & hidden


def groups_of_plan(plan: BlockPlan) -> list[list[Group]]:
    """Per list of the plan (one, or one per head) its groups; kept in the plan."""
    if "groups" not in plan.cache:
        plan.cache["groups"] = [_groups_of(plan, head) for head in range(plan.mask_heads)]
    return plan.cache["groups"]  # type: ignore[return-value]


def _groups_of(plan: BlockPlan, head: int) -> list[Group]:
    row = head if plan.num_heads > 1 else 0
    ptr = plan.row_ptr[row].tolist()
    full = plan.num_full[row].tolist()
    columns = plan.columns.tolist()
    same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for tile, count in enumerate(full):
        first, last = ptr[tile], ptr[tile + 1]
        lists = (tuple(sorted(columns[first : first + count])), tuple(sorted(columns[first + count : last])))
        same.setdefault(lists, []).append(tile)
    groups = [_group(plan, head, tiles, *lists) for lists, tiles in same.items() if lists != ((), ())]
    return [g for g in groups if g.keys.numel()]


def _group(plan: BlockPlan, head: int, tiles: list[int], full: tuple[int, ...], partial: tuple[int, ...]) -> Group:
    queries = _lanes(plan.query_tiles, tiles)
    whole, ragged = _lanes(plan.key_tiles, list(full)), _lanes(plan.key_tiles, list(partial))
    if not ragged.numel() or plan.rule is None:
        return Group(queries, whole, None)
    seen = plan.rule(queries[:, None], ragged[None, :])
    seen = seen[head if seen.shape[0] > 1 else 0]
    kept = seen.any(0)
    ragged, seen = ragged[kept], seen[:, kept]
    mask = torch.cat([torch.ones(queries.numel(), whole.numel(), dtype=torch.bool), seen], 1)
    return Group(queries, torch.cat([whole, ragged]), None if bool(seen.all()) else mask)


def _lanes(tiles: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Token indices of the used lanes of the chosen tiles, int64."""
    lanes = tiles[chosen].flatten() if chosen else tiles.new_empty(0)
    return lanes[lanes >= 0].long()
