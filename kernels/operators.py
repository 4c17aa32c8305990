"""The kernels as torch.library ops, so that torch.compile sees one node whatever the plan, with its gradient.

A plan travels as its handle, a 0-dim tensor: changing the plan, its length lists or its density never recompiles anything.
Which kernel serves is settled inside the op, when real tensors are there.
"""

import torch

from genattn.kernels.cpu.backward import grouped_backward
from genattn.kernels.cpu.grouped import grouped_attention, why_not_grouped
from genattn.kernels.cpu.native import native_attention, why_not_native
from genattn.kernels.plan.block_plan import BlockPlan, plan_of_handle
from genattn.kernels.triton.block_sparse import triton_backward, triton_forward, why_not_triton
from genattn.kernels.triton.full_tiles import full_tiles_forward, why_not_full_tiles
from genattn.kernels.triton.int8_scores import triton_int8_forward, why_not_int8

OP_IMPLS = ("triton", "cpu", "grouped")
NAMED_IMPLS = ("triton-int8", "triton-full")  # never taken unless named
_FORWARD = {
    "triton": triton_forward,
    "cpu": native_attention,
    "triton-int8": triton_int8_forward,
    "triton-full": full_tiles_forward,
}


def why_not_op(impl: str, query: torch.Tensor, plan: BlockPlan, scale: float | None) -> str | None:
    """The reason why one of `OP_IMPLS` or `NAMED_IMPLS` cannot serve, or None."""
    if impl in NAMED_IMPLS:
        return (why_not_int8 if impl == "triton-int8" else why_not_full_tiles)(query, plan, scale)
    if impl == "triton":
        return why_not_triton(query, plan, scale)
    return why_not_native(query, plan) if impl == "cpu" else why_not_grouped(query, plan)


def _settle(impl: str, query: torch.Tensor, plan: BlockPlan, scale: float) -> str:
    reasons = {name: why_not_op(name, query, plan, scale) for name in (OP_IMPLS if impl == "auto" else (impl,))}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise ValueError(f"impl={impl!r} cannot serve this call: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")


@torch.library.custom_op("genattn::block_sparse_forward", mutates_args=())
def block_sparse_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float,
    impl: str,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Sq, H, D], lse [B, Sq, H]) of the plan behind `handle`; lse is [0], and no gradient, without `with_lse`."""
    plan = plan_of_handle(handle).to(query.device)
    name = _settle(impl, query, plan, scale)
    if name == "grouped":
        out, lse = grouped_attention(query, key, value, plan, scale=scale, key_mask=key_mask, with_lse=with_lse)
    else:
        out, lse = _FORWARD[name](query, key, value, plan, scale=scale, key_mask=key_mask)  # type: ignore[operator]
    return out.contiguous(), lse.contiguous() if with_lse else lse.new_empty(0)


@block_sparse_forward.register_fake
def _(query, key, value, key_mask, handle, scale, impl, with_lse=True):  # type: ignore[no-untyped-def]
    lse_type = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3] if with_lse else 0, dtype=lse_type)


@torch.library.custom_op("genattn::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    if impl in NAMED_IMPLS:
        raise ValueError(f"impl={impl!r} has no backward; use impl='triton' where gradients are wanted")
    plan = plan_of_handle(handle).to(query.device)
    run = triton_backward if _settle(impl, query, plan, scale) == "triton" else grouped_backward
    grads = run(grad_out, grad_lse, query, key, value, out, lse, plan, scale=scale, key_mask=key_mask)
    return tuple(g.contiguous() for g in grads)  # type: ignore[return-value]


@block_sparse_backward.register_fake
def _(grad_out, grad_lse, query, key, value, key_mask, out, lse, handle, scale, impl):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, key_mask, handle, ctx.scale, ctx.impl, ctx.with_lse = inputs
    ctx.save_for_backward(query, key, value, key_mask, handle, *output)
    if type(handle) is torch.Tensor:
        # the plan must outlive this graph; under a tracer the handle is a stand-in
        ctx.plan = plan_of_handle(handle)


def _grads(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    if not ctx.with_lse:
        raise RuntimeError("with_lse must be True where gradients are wanted, got False")
    query, key, value, key_mask, handle, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = block_sparse_backward(grad_out, grad_lse, query, key, value, key_mask, out, lse, handle, ctx.scale, ctx.impl)
    return *grads, None, None, None, None, None


block_sparse_forward.register_autograd(_grads, setup_context=_save)
