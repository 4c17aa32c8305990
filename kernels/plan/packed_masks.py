"""One bit per score of a plan's partial tiles, for rules that a kernel cannot evaluate itself.

A tile is [BQ, words] of 16 bits, lane 0 in the lowest bit. Slots number the partial entries of the plan through.
"""

import torch
import torch.nn.functional as F

from genattn.kernels.plan.block_plan import BlockPlan

_TILES_AT_ONCE = 64


def mask_bytes(plan: BlockPlan) -> int:
    """Bytes that the packed masks of all partial tiles take."""
    partial = int(plan.entries[1].sum()) * (plan.mask_heads // plan.num_heads)
    return partial * plan.block_q * -(-plan.block_k // 16) * 2


def empty_masks(plan: BlockPlan, count: int) -> torch.Tensor:
    """Int16 [count, BQ, words], nothing visible."""
    return torch.zeros(count, plan.block_q, -(-plan.block_k // 16), dtype=torch.int16, device=plan.device)


def packed_masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, bits) of the whole plan by calling its rule; kept in the plan."""
    if "packed" not in plan.cache:
        slots = mask_slots(plan)
        bits = empty_masks(plan, max(1, int(slots.max()) + 1 if slots.numel() else 1))
        fill_masks(plan, slots, bits)
        plan.cache["packed"] = slots, bits
    return plan.cache["packed"]  # type: ignore[return-value]


def mask_slots(plan: BlockPlan) -> torch.Tensor:
    """Partial entries counted through, int32 [1, nnz], or [heads, nnz] when heads share lists but not rules; -1 elsewhere."""
    partial = plan.entries[1]
    owned = partial.expand(plan.mask_heads // plan.num_heads, -1)
    return torch.where(owned, owned.flatten().cumsum(0).view_as(owned) - 1, -1).to(torch.int32)


def fill_masks(plan: BlockPlan, slots: torch.Tensor, bits: torch.Tensor) -> None:
    """Fill `bits` by calling the rule; for rules that a kernel does not know."""
    if plan.rule is None:
        return
    row, partial = plan.entries
    tile = row % plan.query_tiles.shape[0]
    # bit 15 of an int16 is its sign
    weights = torch.tensor([1 << i for i in range(15)] + [-(1 << 15)], dtype=torch.int32, device=bits.device)
    for chunk in torch.nonzero(partial).flatten().split(_TILES_AT_ONCE):
        queries = plan.query_tiles[tile[chunk]].long()[:, :, None]
        keys = plan.key_tiles[plan.columns[chunk].long()].long()[:, None, :]
        seen = plan.rule(queries.clamp_min(0), keys.clamp_min(0)) & (queries >= 0) & (keys >= 0)
        seen = F.pad(seen, (0, bits.shape[2] * 16 - plan.block_k)).unflatten(-1, (bits.shape[2], 16))
        packed = (seen.int() * weights).sum(-1).to(torch.int16)
        if packed.shape[0] > slots.shape[0]:
            # lists per head: each entry belongs to one head
            head = torch.div(row[chunk], plan.query_tiles.shape[0], rounding_mode="floor")
            packed = packed[head, torch.arange(chunk.numel(), device=head.device)][None]
        bits[slots[:, chunk].long()] = packed.expand(slots.shape[0], -1, -1, -1)
