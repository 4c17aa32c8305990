"""The definition of every perturbation target: explicit attention maps in float64, one S x S tensor per head.

A' = (1 - u) A + u T (arXiv 2506.10978, eq. 7), then A'V. Only for checking `genattn.guidance.softpag.perturbation`; memory is
quadratic in the sequence.
"""

import torch

from genattn.errors import GenAttnError
from genattn.guidance.softpag.perturbation import check_target, image_rows
from genattn.seam.plugin import AttentionCall


def attention_map(query: torch.Tensor, key: torch.Tensor, scale: float | None, allowed: torch.Tensor) -> torch.Tensor:
    """softmax over the allowed keys, float64 [B, H, Sq, Sk]; a row that may see nothing is zero.

    Args:
        query: [B, Sq, H, D].
        key: [B, Sk, H, D].
        scale: factor of the logits, None for 1 / sqrt(D).
        allowed: additive float64, broadcastable to [B, H, Sq, Sk].
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * factor + allowed
    return logits.softmax(-1).nan_to_num(0.0)


def perturbed_attention(call: AttentionCall, u: torch.Tensor, target: str) -> torch.Tensor:
    """What an attention call with perturbed heads must give.

    Args:
        call: the call; a causal one is refused.
        u: weights of all heads, [H] or [B, H].
        target: one of `genattn.guidance.softpag.perturbation.TARGETS` but "skip".

    Returns:
        float64 [B, Sq, H, D].

    Raises:
        GenAttnError: for "skip" and causal calls.
    """
    if check_target(target) == "skip" or call.is_causal:
        raise GenAttnError(f"an explicit map must be of one attention call, not causal, got {target!r}; use another target")
    repeat = call.query.shape[2] // call.key.shape[2]
    key, value = (t.repeat_interleave(repeat, dim=2) for t in (call.key, call.value))
    allowed = _allowed(call)
    plain = attention_map(call.query, key, call.scale, allowed)
    goal = _target_map(call, key, plain, allowed, target)
    weight = u.double().reshape(-1, call.query.shape[2], 1, 1)
    mixed = (1 - weight) * plain + weight * goal
    return torch.einsum("bhij,bjhd->bihd", mixed, value.double())


def _allowed(call: AttentionCall) -> torch.Tensor:
    mask = call.mask
    if mask is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=call.query.device)
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask.dtype != torch.bool:
        return mask.double()
    return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -torch.inf)


def _target_map(
    call: AttentionCall, key: torch.Tensor, plain: torch.Tensor, allowed: torch.Tensor, target: str
) -> torch.Tensor:
    eye = torch.eye(plain.shape[-2], plain.shape[-1], dtype=torch.float64, device=plain.device).expand_as(plain)
    if target == "identity":
        return eye
    if target == "zero":
        return torch.zeros_like(plain)
    if target == "uniform":
        return allowed.expand_as(plain).softmax(-1)
    if target == "mean_query":
        query = call.query.double().mean(1, keepdim=True).expand(-1, call.query.shape[1], -1, -1)
        return attention_map(query, key, call.scale, allowed)
    rows = image_rows(call)
    image = torch.zeros(plain.shape[-2], dtype=torch.bool, device=plain.device)
    image[slice(None) if rows is None else rows] = True
    if target == "identity_text":
        return torch.where(image[:, None], plain, eye)
    if target == "identity_image":
        return torch.where(image[:, None], eye, plain)
    others = image[:, None] & image[None, :] & (eye[0, 0] == 0)
    only_self = torch.zeros_like(eye[0, 0]).masked_fill(others, -torch.inf)
    return attention_map(call.query, key, call.scale, allowed + only_self)
