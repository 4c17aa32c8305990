"""flex_attention from the same plan: the peer to measure against, and a route on devices where it compiles.

Tiles must be runs of the sequence, as flex knows nothing else; full tiles skip the mask, partial ones ask a packed bit.
Compiled, it is a real block-sparse kernel; torch on the CPU gives it no log-sum-exp and no gradient.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from genattn.kernels.block_plan import BlockPlan
from genattn.kernels.reference import tile_states, visible_mask
from genattn.kernels.triton_tables import are_runs

_MASK_TOKENS = 32_768


def why_not_flex(query: torch.Tensor, plan: BlockPlan, return_lse: bool, key_mask: bool) -> str | None:
    """The reason why flex_attention cannot serve this call, or None."""
    if not (are_runs(plan.query_tiles, plan.seqlen_q) and are_runs(plan.key_tiles, plan.seqlen_k)):
        return "its tiles must be runs of the sequence, this plan gathers them"
    if key_mask:
        return "a key mask would need a new compiled mask for every call; use another impl"
    if query.device.type == "cpu" and return_lse:
        return "flex_attention on the CPU returns no log-sum-exp"
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        return "flex_attention on the CPU has no backward"
    if plan.rule is not None and max(plan.seqlen_q, plan.seqlen_k) > _MASK_TOKENS:
        return f"its mask table must stay under {_MASK_TOKENS} tokens, got {plan.seqlen_k}"
    return None


def flex_block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out [B, Sq, H, D], lse [B, Sq, H] or None on the CPU); compiles on the first call for a shape."""
    mask = _block_mask(plan)
    on_cpu = query.device.type == "cpu"
    result = _compiled()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_lse=not on_cpu,
    )
    if on_cpu:
        return result.transpose(1, 2), None
    return result[0].transpose(1, 2), result[1].transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(plan: BlockPlan) -> BlockMask:
    if "flex" not in plan.cache:
        states = tile_states(plan)[None]
        partial, full = (_dense_lists(states == kind) for kind in (1, 2))
        plan.cache["flex"] = BlockMask.from_kv_blocks(
            *partial,
            *full,
            BLOCK_SIZE=(plan.block_q, plan.block_k),
            mask_mod=_mask_mod(plan),
            seq_lengths=(plan.seqlen_q, plan.seqlen_k),
        )
    return plan.cache["flex"]  # type: ignore[return-value]


def _dense_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts [1, N, NQ], tile numbers [1, N, NQ, NK]), the chosen ones first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32), order.to(torch.int32)


def _mask_mod(plan: BlockPlan):  # type: ignore[no-untyped-def]
    if plan.rule is None:
        return None
    table = visible_mask(plan)
    heads = table.shape[0]

    def visible(batch, head, query_index, key_index):  # type: ignore[no-untyped-def]
        return table[head if heads > 1 else 0, query_index, key_index]

    return visible
