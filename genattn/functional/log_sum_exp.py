"""Dense attention that tells its log-sum-exp, where PyTorch's own kernels do: with it two answers over disjoint keys are one.

out = sum_i e^(lse_i - lse) out_i,     lse = log sum_i e^lse_i
"""

import sys
from typing import Any

import torch

from genattn.kernels.block_sparse import as_autocast
from genattn.kernels.plan.exact import exact

_ROWS = 1 << 24  # scores at a time where no kernel tells: 64 MB in float32


def dense_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out [B, Sq, H, D], lse [B, Sq, H]) by a fused kernel; None where none serves.

    Args:
        query: [B, Sq, H, D].
        key: [B, Sk, Hk, D].
        value: the same.
        mask: None, bool or additive, [B, Sk] or broadcastable to [B, H, Sq, Sk].
        scale: of the scores, None for D ** -0.5.
    """
    query, key, value = as_autocast(query, key, value)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return None
    if mask is not None and not isinstance(mask, torch.Tensor):
        return None
    repeat = query.shape[2] // key.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (query, *(t.repeat_interleave(repeat, 2) if repeat > 1 else t for t in (key, value))))
    found = _fused(q, k, v, _bias(mask, q, k), scale)
    return None if found is None else (found[0].transpose(1, 2), found[1].transpose(1, 2))


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device, for few keys: some rows of scores at a time where no kernel serves, in at least float32."""
    found = dense_with_lse(query, key, value, mask, scale)
    return _by_rows(*as_autocast(query, key, value), mask, scale) if found is None else found


@exact
def _by_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    repeat = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeat, 2) if repeat > 1 else t for t in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    bias = _bias(mask, query.transpose(1, 2), key.transpose(1, 2))
    rows = max(1, _ROWS // max(1, query.shape[0] * query.shape[2] * key.shape[1]))
    outs, sums = [], []
    for start in range(0, query.shape[1], rows):
        part = query[:, start : start + rows].to(wide)
        scores = torch.einsum("bihd,bjhd->bhij", part, key.to(wide)) * factor
        if bias is not None:
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., start : start + rows, :])
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp(min=-1e30)[..., None]).exp()
        outs.append(torch.einsum("bhij,bjhd->bihd", weights, value.to(wide)).to(query.dtype))
        sums.append(lse.transpose(1, 2))
    return torch.cat(outs, 1), torch.cat(sums, 1)


@exact
def merged(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The answer over the keys of both, [B, S, H, D]; a part that sees nothing has a log-sum-exp of minus infinity."""
    top = torch.maximum(first[1], second[1]).clamp(min=-1e30)
    weights = [(lse - top).exp()[..., None] for _, lse in (first, second)]
    total = (weights[0] + weights[1]).clamp(min=torch.finfo(weights[0].dtype).tiny)
    # a part without keys may hold anything
    parts = [torch.where(w > 0, w * out.to(w.dtype), torch.zeros_like(w)) for w, (out, _) in zip(weights, (first, second))]
    return ((parts[0] + parts[1]) / total).to(first[0].dtype)


def is_native(stock: Any, backend: Any) -> bool:
    """Whether diffusers' dispatch would come to PyTorch's scaled_dot_product_attention."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None or stock is not dispatch.dispatch_attention_fn:
        return False
    chosen = backend if backend is not None else dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(chosen, "value", chosen)) == "native"


def _bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """A mask as summands, [B or 1, H or 1, Sq or 1, Sk]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(q.dtype)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Heads-first; the operators behind scaled_dot_product_attention, which keep what it throws away."""
    aten = torch.ops.aten
    if not k.shape[2]:
        return None
    if q.device.type == "cpu" and hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        if bias is not None:
            bias = bias.expand(bias.shape[0], bias.shape[1], q.shape[2], k.shape[2])
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse
    if q.device.type != "cuda" or bias is not None:
        return None
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        if torch.cuda.get_device_capability(q.device)[0] < 8:
            return None
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
        return found[0], found[1]
    found = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
    return found[0], found[1][:, :, : q.shape[2]]
