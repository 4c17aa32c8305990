"""Dense SDPA with a boolean mask: right for every plan, as slow as dense attention, and the S x S mask is real memory.

For short sequences and odd masks, where setting up a sparse kernel costs more than it saves.
"""

import torch
import torch.nn.functional as F

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.reference.attention import pseudo_rows, visible_mask
from genattn.kernels.reference.keys_twice import keys_twice, lowered_tail_keys, with_keys_twice
from genattn.kernels.reference.tail import TailKeys

_MASK_BYTES = 1 << 30


def why_not_sdpa_mask(query: torch.Tensor, plan: BlockPlan, return_lse: bool) -> str | None:
    """The reason why masked SDPA cannot serve this call, or None."""
    if return_lse:
        return "scaled_dot_product_attention returns no log-sum-exp; use return_lse=False or another impl"
    plan = plan if plan.fade is None else keys_twice(plan)
    size = plan.mask_heads * plan.seqlen_q * plan.seqlen_k
    if plan.tail is not None:
        # weights of pseudo-keys make it a float mask
        size = 4 * plan.mask_heads * plan.seqlen_q * (plan.seqlen_k + plan.tail.pseudo_keys)
    if size > _MASK_BYTES:
        return f"its mask must stay under {_MASK_BYTES >> 20} MiB, this plan needs {size >> 20} MiB"
    return None


def sdpa_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by `scaled_dot_product_attention` with the plan's mask; [B, Sq, H, D], differentiable."""
    if key_mask is not None:
        key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
    given = with_keys_twice(plan, key, value, key_mask)
    plan, key, value, key_mask = given.plan, given.key, given.value, given.key_mask
    visible = _mask_on(plan, query.device)[None]
    pseudo = None if plan.tail is None else lowered_tail_keys(given)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if pseudo is not None:
        weights = _weights(plan, pseudo, query.shape[2])
        visible = _side_by_side(visible, torch.isfinite(weights))
        key, value = (torch.cat([x, more.to(x.dtype)], 1) for x, more in ((key, pseudo.key), (value, pseudo.value)))
    empty = ~visible.any(-1, keepdim=True)
    mask = visible | empty
    if pseudo is not None or given.penalty is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
        if given.penalty is not None:
            bias[..., : plan.seqlen_k].sub_(given.penalty)
        if pseudo is not None:
            bias[..., plan.seqlen_k :].add_(weights.nan_to_num(neginf=0.0))
        mask = bias  # type: ignore[assignment]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        # a fully hidden row would be NaN in some backends: let it see everything, then clear it
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.masked_fill(empty, 0.0).transpose(1, 2)


def _mask_on(plan: BlockPlan, device: torch.device) -> torch.Tensor:
    if ("mask", device) not in plan.cache:
        plan.cache["mask", device] = lasting(visible_mask)(plan.to(device))
    return plan.cache["mask", device]  # type: ignore[return-value]


def _weights(plan: BlockPlan, pseudo: TailKeys, heads: int) -> torch.Tensor:
    """[B, N, Sq, P]: log of the number of keys that a pseudo-key stands for, -inf where a query does not see it."""
    seen = pseudo_rows(plan, torch.arange(plan.seqlen_q, device=pseudo.key.device))[None]
    return pseudo.weights_of(heads)[:, :, None].masked_fill(~seen, float("-inf"))


def _side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(left.shape[:3], right.shape[:3])
    return torch.cat([left.expand(*shape, -1), right.expand(*shape, -1)], -1)
