"""One bit per score of a plan's partial tiles, for rules that a kernel cannot evaluate itself.

A tile is [BQ, words] of 16 bits, lane 0 in the lowest bit. Slots number the partial entries of the plan through; heads that
follow the same rule over the same lists share theirs.
"""

import torch
import torch.nn.functional as F

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import PerHeadRule, rule_of_head
from genattn.kernels.plan.lasting import lasting

_SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 23}


def mask_bytes(plan: BlockPlan) -> int:
    """Bytes that the packed masks of all partial tiles take."""
    lengths, full = plan.row_lengths.sum(1).tolist(), plan.num_full.sum(1).tolist()
    lists = [head if plan.num_heads > 1 else 0 for head in mask_owners(plan) if head >= 0]
    partial = sum(lengths[row] - full[row] for row in lists)
    return int(partial) * plan.block_q * -(-plan.block_k // 16) * 2


def mask_owners(plan: BlockPlan) -> list[int]:
    """Per head (of `plan.mask_heads`): itself when it has masks of its own, else -1 - the head whose masks it shares."""
    if "mask owners" not in plan.cache:
        plan.cache["mask owners"] = _find_owners(plan)
    return plan.cache["mask owners"]  # type: ignore[return-value]


def _find_owners(plan: BlockPlan) -> list[int]:
    if not isinstance(plan.rule, PerHeadRule):
        return list(range(plan.mask_heads))
    first: dict[int, list[int]] = {}
    owners = []
    for head, choice in enumerate(plan.rule.choice):
        same = (other for other in first.setdefault(choice, []) if _same_lists(plan, head, other))
        owner = next(same, head)
        if owner == head:
            first[choice].append(head)
        owners.append(head if owner == head else -1 - owner)
    return owners


def _same_lists(plan: BlockPlan, head: int, other: int) -> bool:
    if plan.num_heads == 1:
        return True
    pointers = [plan.row_ptr[h] - plan.row_ptr[h, 0] for h in (head, other)]
    lists = [plan.columns[_span(plan, h)] for h in (head, other)]
    return torch.equal(*pointers) and torch.equal(plan.num_full[head], plan.num_full[other]) and torch.equal(*lists)


def _span(plan: BlockPlan, head: int) -> slice:
    """Where the lists of a head stand in `columns`."""
    row = head if plan.num_heads > 1 else 0
    return slice(int(plan.row_ptr[row, 0]), int(plan.row_ptr[row, -1]))


def empty_masks(plan: BlockPlan, count: int) -> torch.Tensor:
    """Int16 [count, BQ, words], nothing visible."""
    return torch.zeros(count, plan.block_q, -(-plan.block_k // 16), dtype=torch.int16, device=plan.device)


def packed_masks(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, bits) of the whole plan by calling its rule; kept in the plan."""
    if "packed" not in plan.cache:
        plan.cache["packed"] = _packed(plan)
    return plan.cache["packed"]  # type: ignore[return-value]


@lasting
def _packed(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    slots = mask_slots(plan)
    bits = empty_masks(plan, max(1, int(slots.max()) + 1 if slots.numel() else 1))
    fill_masks(plan, slots, bits)
    return slots, bits


def mask_slots(plan: BlockPlan) -> torch.Tensor:
    """Partial entries counted through, int32 [1, nnz], or [heads, nnz] when heads share lists but not rules; -1 elsewhere."""
    partial = plan.entries[1]
    slots = torch.full((plan.mask_heads // plan.num_heads, partial.numel()), -1, dtype=torch.int32, device=plan.device)
    count = 0
    for head, owner in enumerate(mask_owners(plan)):
        row, span = (head if slots.shape[0] > 1 else 0), _span(plan, head)
        if owner < 0:
            of_owner = slots[-1 - owner if slots.shape[0] > 1 else 0, _span(plan, -1 - owner)]
            slots[row, span] = of_owner
            continue
        mine = partial[span]
        slots[row, span] = torch.where(mine, mine.cumsum(0) - 1 + count, -1).to(torch.int32)
        count += int(mine.sum())
    return slots


def owned_slots(plan: BlockPlan, slots: torch.Tensor) -> torch.Tensor:
    """`slots` with -1 for the heads that share another's masks, so that each mask is written once."""
    mine = slots.clone()
    for head, owner in enumerate(mask_owners(plan)):
        if owner < 0:
            mine[head if slots.shape[0] > 1 else 0, _span(plan, head)] = -1
    return mine


def fill_masks(plan: BlockPlan, slots: torch.Tensor, bits: torch.Tensor) -> None:
    """Fill `bits` by calling the rule, for each head that owns its masks; for rules that a kernel does not know."""
    if plan.rule is None:
        return
    row, partial = plan.entries
    tile = row % plan.query_tiles.shape[0]
    at_once = max(1, _SCORES_AT_ONCE.get(plan.device.type, 1 << 20) // (plan.block_q * plan.block_k))
    for head, owner in enumerate(mask_owners(plan)):
        if owner < 0:
            continue
        rule, span = rule_of_head(plan.rule, head), _span(plan, head)
        mine = slots[head if slots.shape[0] > 1 else 0]
        for chunk in (torch.nonzero(partial[span]).flatten() + span.start).split(at_once):
            queries = plan.query_tiles[tile[chunk]].long()[:, :, None]
            keys = plan.key_tiles[plan.columns[chunk].long()].long()[:, None, :]
            seen = rule(queries.clamp_min(0), keys.clamp_min(0))[0] & (queries >= 0) & (keys >= 0)
            bits[mine[chunk].long()] = packed(seen)


def packed(seen: torch.Tensor) -> torch.Tensor:
    """Bool [..., lanes] as int16 [..., ceil(lanes / 16)]."""
    # bit 15 of an int16 is its sign
    weights = torch.tensor([1 << i for i in range(15)] + [-(1 << 15)], dtype=torch.int32, device=seen.device)
    words = F.pad(seen, (0, -seen.shape[-1] % 16)).unflatten(-1, (-1, 16))
    return (words.int() * weights).sum(-1).to(torch.int16)


def unpacked(bits: torch.Tensor, lanes: int) -> torch.Tensor:
    """What `packed` made of bool [..., lanes]."""
    places = torch.arange(16, device=bits.device, dtype=torch.int32)
    return ((bits.int()[..., None] >> places) & 1).bool().flatten(-2)[..., :lanes]
