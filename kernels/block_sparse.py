"""Block-sparse attention: the public entry, and the choice of what computes it.

    block_sparse_attention(query, key, value, plan)      impl="auto" takes the first backend that has no objection

Every backend answers `why_not(...)` with a reason or None. Who names a backend that cannot serve gets the reason as an
error; "auto" goes on to the next, and `choose_impl` tells what it took and why not the ones before.
"""

import torch

from genattn.kernels.failures import KernelFailure, failed_before, remember_failure
from genattn.kernels.operators import NAMED_IMPLS, OP_IMPLS, block_sparse_forward, by_auto, why_not_op
from genattn.kernels.peers.optional import PEERS, peer_attention, why_not_peer
from genattn.kernels.peers.sdpa_mask import sdpa_mask_attention, why_not_sdpa_mask
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.attention import reference_attention

IMPLS = ("auto", *OP_IMPLS, "flex", "sdpa", "reference", *NAMED_IMPLS, *PEERS)
_AUTO = tuple(name for name in IMPLS[1:] if name not in (*NAMED_IMPLS, *PEERS))


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query` over the keys that `plan` lets it see.

    query [B, Sq, H, D]; key, value [B, Sk, Hk, D], Hk a divisor of H (grouped queries); any strides; fp16, bf16, fp32
    (float64 in "reference"). scale: default D ** -0.5. key_mask: bool [B, Sk], False hides a key from every query: what
    stands there may be NaN or Inf and reaches no result and no gradient. At a key that the plan alone hides from a query, NaN
    and Inf may reach that query, as `scaled_dot_product_attention` lets them through its mask.
    Returns out [B, Sq, H, D], or (out, lse) with lse [B, Sq, H] the natural log of the softmax's denominator. A query that
    sees nothing gets zeros and -inf.

    Raises ValueError for shapes that do not fit together, and with the reason when the named `impl` cannot serve.
    """
    query, key, value = as_autocast(query, key, value)
    check_inputs(query, key, value, plan, key_mask)
    if torch.compiler.is_compiling() and impl == "auto":
        # inside a compiled graph the op itself settles which kernel serves
        return _run("auto", query, key, value, plan, scale, key_mask, return_lse)
    while True:
        chosen, _ = choose_impl(
            query, key, value, plan, impl=impl, return_lse=return_lse, scale=scale, masked=key_mask is not None
        )
        automatic = impl == "auto" and chosen in OP_IMPLS
        try:
            name = by_auto(chosen) if automatic else chosen
            return _run(name, query, key, value, plan, scale, key_mask, return_lse)
        except KernelFailure as failure:
            if not automatic:
                raise
            remember_failure(failure, query, plan, "another backend serves")


def _run(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if name == "sdpa":
        return sdpa_mask_attention(query, key, value, plan.to(query.device), scale=scale, key_mask=key_mask)
    if name in PEERS:
        return peer_attention(name, query, key, value, plan.to(query.device), scale)
    out: torch.Tensor
    lse: torch.Tensor | None
    if name == "flex":
        from genattn.kernels.peers.flex import flex_block_attention

        out, lse = flex_block_attention(query, key, value, plan.to(query.device), scale=scale)
    elif name == "reference":
        out, lse = reference_attention(query, key, value, plan.to(query.device), scale=scale, key_mask=key_mask)
    else:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        with_lse = return_lse or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        out, lse = block_sparse_forward(query, key, value, key_mask, plan.handle, factor, name, with_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def as_autocast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three tensors as scaled_dot_product_attention would take them: under autocast in its type, float64 left alone.

    Norms give float32 there, so without this a model whose queries are normalised would bring two types.
    """
    first, second, third = (x.to(working_dtype(x)) for x in (query, key, value))
    return first, second, third


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which a tensor enters attention: its own, or autocast's where that is on."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor.dtype
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else tensor.dtype


def choose_impl(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    impl: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    masked: bool = False,
) -> tuple[str, dict[str, str]]:
    """(the backend that will run, {backend passed over: reason})."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    reasons: dict[str, str] = {}
    hidden = under_transform(query, key, value)
    for name in _AUTO if impl == "auto" else (impl,):
        reason = failed_before(name, query, plan) if impl == "auto" else None
        if hidden and name != "reference":
            reason = "torch.func transforms (grad, vmap, jvp) see into no kernel"
        reason = reason or _why_not(name, query, plan, return_lse, scale, masked)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise ValueError(f"impl={impl!r} cannot serve this call: {'; '.join(reasons.values())}; use impl='auto'")


def under_transform(*tensors: torch.Tensor) -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) holds one of the tensors: a kernel finds no memory behind it."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _why_not(
    name: str, query: torch.Tensor, plan: BlockPlan, return_lse: bool, scale: float | None, masked: bool
) -> str | None:
    if name == "flex":
        # loads the compiler, which most callers never need
        from genattn.kernels.peers.flex import why_not_flex

        return why_not_flex(query, plan, return_lse, masked)
    if name in PEERS:
        return why_not_peer(name, query, plan, return_lse, masked)
    if name == "sdpa":
        return why_not_sdpa_mask(query, plan, return_lse)
    return why_not_op(name, query, plan, scale) if name in (*OP_IMPLS, *NAMED_IMPLS) else None


def check_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None
) -> None:
    """Raise ValueError unless the tensors fit together and fit the plan."""
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            "query must be [B, Sq, H, D], key and value [B, Sk, Hk, D], "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise ValueError(
            "query and key must agree in batch and head dim, and key heads must divide query heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if (query.shape[1], key.shape[1]) != (plan.seqlen_q, plan.seqlen_k):
        raise ValueError(
            f"the plan is for {plan.seqlen_q} queries and {plan.seqlen_k} keys, got {query.shape[1]} and {key.shape[1]}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"query, key and value must share one floating type, got {query.dtype}, {key.dtype}, {value.dtype}")
    if plan.mask_heads not in (1, query.shape[2]):
        raise ValueError(
            f"the plan is for {plan.mask_heads} heads, got {query.shape[2]} query heads; build it for 1 or as many"
        )
    if key_mask is not None and (key_mask.shape != key.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {tuple(key.shape[:2])}, got {key_mask.dtype} {tuple(key_mask.shape)}")
