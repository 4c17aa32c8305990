"""Scores from int8 queries and keys: the opt-in backend "triton-int8", its definition and its limits.

    K' = K - mean over tokens of K                     softmax does not change: q . mean is the same for all keys of a query
    Q8 = round(Q / dq), K8 = round(K' / dk)            dq = max |Q| / 127 of a query tile, dk likewise of a key tile
    scores = scale dq dk Q8 K8^T                       exact in int32; softmax, values and output stay as they are

SageAttention's smoothing and per-block scales (Zhang et al., arXiv 2410.02367, section 4), on the tiles of a block plan. An
8-bit product runs twice as fast as a 16-bit one; what it costs is an error near 1e-2 of the output on random data, which is why
nothing takes this backend unless it is named. Forward only.
"""

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton.block_sparse import empty_results, forward_arguments, forward_grid, why_not_triton
from genattn.kernels.triton.launch import Arguments, launch, padded


def why_not_int8(query: torch.Tensor, plan: BlockPlan, scale: float | None = None) -> str | None:
    """The reason why int8 scores cannot serve this call, or None."""
    reason = why_not_triton(query, plan, scale)
    if reason is not None:
        return reason
    if plan.tail is not None:
        return f"int8 scores stand in for no skipped tiles, the plan asks for tail={plan.tail.kind!r}; use 'triton'"
    if plan.fade is not None:
        return "int8 scores have no factor per tile pair, the plan lowers logits outside a window; use 'triton'"
    if query.dtype == torch.float32:
        return "int8 scores are for float16 and bfloat16: at float32 their error would be out of proportion"
    if query.requires_grad and torch.is_grad_enabled():
        return "int8 scores have no backward; use 'triton'"
    return None


def smoothed_mean(key: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Float32 [B, Hk, D]: mean of key [B, Sk, Hk, D] over the tokens that stand in a key tile and are not hidden."""
    listed = torch.zeros(plan.seqlen_k, dtype=torch.bool, device=key.device)
    listed[plan.key_tiles[plan.key_tiles >= 0].long()] = True
    seen = listed.expand(key.shape[:2]) if key_mask is None else listed & key_mask
    # what is hidden may hold anything, NaN too
    total = key.float().masked_fill(~seen[:, :, None, None], 0.0).sum(1)
    return total / seen.sum(1).clamp_min(1)[:, None, None]


def quantised(rows: torch.Tensor, tiles: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [B, S, H, D], scales float32 [B, H, tiles]) of float32 rows [B, S, H, D]; tiles int32 [T, block], -1 unused.

    mask: bool [B, S], False rows count for nothing. Row = int8 x scale of its tile, within half a scale.
    """
    if mask is not None:
        rows = rows.masked_fill(~mask[:, :, None, None], 0.0)
    batch, seqlen, heads, _ = rows.shape
    used = tiles >= 0
    owner = torch.zeros(seqlen, dtype=torch.int64, device=rows.device)
    listed = torch.zeros(seqlen, dtype=torch.bool, device=rows.device)
    tokens = tiles[used].long()
    owner[tokens] = torch.arange(len(tiles), device=rows.device)[:, None].expand_as(tiles)[used]
    listed[tokens] = True
    largest = rows.abs().amax(3).masked_fill(~listed[None, :, None], 0.0)
    peaks = rows.new_zeros(batch, len(tiles), heads)
    peaks.scatter_reduce_(1, owner[None, :, None].expand_as(largest), largest, "amax")
    scales = torch.where(peaks > 0, peaks / 127.0, 1.0)
    whole = torch.floor(rows / scales[:, owner][..., None] + 0.5).clamp(-127, 127)
    return whole.nan_to_num().to(torch.int8), scales.transpose(1, 2).contiguous()


def dequantised(whole: torch.Tensor, scales: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Float64 [B, S, H, D] that the integers stand for; rows in no tile are zero."""
    out = torch.zeros(whole.shape, dtype=torch.float64, device=whole.device)
    used = tiles >= 0
    tile = torch.arange(len(tiles), device=tiles.device)[:, None].expand_as(tiles)[used]
    tokens = tiles[used].long()
    out[:, tokens] = whole[:, tokens].double() * scales.double().transpose(1, 2)[:, tile][..., None]
    return out


def int8_reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: `reference_attention` in float64 on the numbers that the integers stand for. (out, lse), float64."""
    parts = _prepared(query, key, plan, scale, key_mask)
    (queries, keys) = (dequantised(*pair, tiles) for pair, tiles in zip(parts[:2], (plan.query_tiles, plan.key_tiles)))
    out, lse = reference_attention(queries, keys, value.double(), plan, scale=scale, key_mask=key_mask)
    return out, lse + parts[2].double()


def triton_int8_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as in `triton_forward`, with int8 scores."""
    from genattn.kernels.triton.forward_kernel import forward_kernel

    value = value if value.stride(-1) == 1 else value.contiguous()
    whole_q, whole_k, shift = _prepared(query, key, plan, scale, key_mask)
    out, lse = empty_results(query, plan)
    arguments = int8_arguments(whole_q, whole_k, value, out, lse, plan, scale, key_mask)
    launch(forward_kernel, forward_grid(query, plan), arguments, query)
    return out, lse + shift


def int8_arguments(
    query: tuple[torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    arch: str | None = None,
) -> Arguments:
    """Every argument of `forward_kernel` for (int8 rows, scales) of queries and keys."""
    arguments = forward_arguments(query[0], key[0], value, out, lse, plan, scale, key_mask, arch=arch)
    # an 8-bit product takes 32 channels at once
    return arguments | {
        "QUERY_SCALES": query[1],
        "KEY_SCALES": key[1],
        "INT8": True,
        "DIM_PAD": max(32, padded(value.shape[-1])),
    }


def _prepared(
    query: torch.Tensor, key: torch.Tensor, plan: BlockPlan, scale: float | None, key_mask: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(query integers, scales), (key integers, scales), and what smoothing took from the log-sum-exp, [B, Sq, H]."""
    mean = smoothed_mean(key, plan, key_mask)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    repeated = mean.repeat_interleave(query.shape[2] // key.shape[2], 1)
    shift = torch.einsum("bshd,bhd->bsh", query.float(), repeated) * factor
    whole_q = quantised(query.float(), plan.query_tiles)
    whole_k = quantised(key.float() - mean[:, None], plan.key_tiles, key_mask)
    return whole_q, whole_k, shift
