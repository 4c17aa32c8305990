"""The kernels as torch.library ops, so that torch.compile sees one node whatever the plan, with its gradient.

A plan travels as its handle, a 0-dim tensor: changing the plan, its length lists or its density never recompiles anything.
Which kernel serves is settled inside the op, when real tensors are there.
"""

import torch

from genattn.kernels.cpu.backward import grouped_backward
from genattn.kernels.cpu.grouped import grouped_attention, why_not_grouped
from genattn.kernels.cpu.native import native_attention, why_not_native
from genattn.kernels.failures import failed_before, failure_of, remember_failure
from genattn.kernels.plan.block_plan import BlockPlan, plan_of_handle
from genattn.kernels.plan.exact import exact
from genattn.kernels.triton.block_sparse import triton_backward, triton_forward, why_not_triton
from genattn.kernels.triton.full_tiles import full_tiles_forward, why_not_full_tiles
from genattn.kernels.triton.int8_scores import triton_int8_forward, why_not_int8

OP_IMPLS = ("triton", "cpu", "grouped")
_ON_THE_CPU = "on the CPU"
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


def by_auto(impl: str) -> str:
    """The name under which an op runs what "auto" has chosen already: a failing backward is then made up for."""
    return f"auto:{impl}"


def _settle(impl: str, query: torch.Tensor, plan: BlockPlan, scale: float) -> str:
    """The kernel that serves. Raises ValueError when none can."""
    if impl.startswith("auto:"):
        return impl.removeprefix("auto:")
    reasons = {}
    for name in OP_IMPLS if impl == "auto" else (impl,):
        before = failed_before(name, query, plan) if impl == "auto" else None
        reasons[name] = before or why_not_op(name, query, plan, scale)
        if impl == "auto" and before is not None and query.device.type != "cpu":
            return _ON_THE_CPU
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
    try:
        out, lse = _forward(name, query, key, value, key_mask, plan, handle, scale, with_lse)
    except Exception as error:
        failure = failure_of(name, error) if name.startswith("triton") else None
        if failure is None:
            raise
        if impl != "auto":
            raise failure from error
        # inside a compiled graph nothing else can be asked
        remember_failure(failure, query, plan, "the CPU computes")
        out, lse = _forward(_ON_THE_CPU, query, key, value, key_mask, plan, handle, scale, with_lse)
    return out.contiguous(), lse.contiguous() if with_lse else lse.new_empty(0)


@exact
def _forward(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    plan: BlockPlan,
    handle: torch.Tensor,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if name == _ON_THE_CPU:
        plan = plan_of_handle(handle).to("cpu")
        mask = None if key_mask is None else key_mask.cpu()
        out, lse = grouped_attention(query.cpu(), key.cpu(), value.cpu(), plan, scale=scale, key_mask=mask)
        return out.to(query.device), lse.to(query.device)
    if name == "grouped":
        return grouped_attention(query, key, value, plan, scale=scale, key_mask=key_mask, with_lse=with_lse)
    return _FORWARD[name](query, key, value, plan, scale=scale, key_mask=key_mask)  # type: ignore[no-any-return, operator]


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
    inputs = grad_out, grad_lse, query, key, value, out, lse
    automatic = impl.startswith("auto")
    if _settle(impl, query, plan, scale) == "triton" and not (automatic and failed_before("triton", query, plan, True)):
        try:
            return _contiguous(triton_backward(*inputs, plan, scale=scale, key_mask=key_mask))
        except Exception as error:
            failure = failure_of("triton", error)
            if failure is None:
                raise
            if not automatic:
                raise failure from error
            remember_failure(failure, query, plan, "the CPU computes gradients", backward=True)
    plan = plan_of_handle(handle).to("cpu")
    mask = None if key_mask is None else key_mask.cpu()
    grad_out, grad_lse, query_, key, value, out, lse = (x.cpu() for x in inputs)
    grads = grouped_backward(grad_out, grad_lse, query_, key, value, out, lse, plan, scale=scale, key_mask=mask)
    return _contiguous(tuple(g.to(query.device) for g in grads))  # type: ignore[arg-type]


def _contiguous(grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@block_sparse_backward.register_fake
def _(grad_out, grad_lse, query, key, value, key_mask, out, lse, handle, scale, impl):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, key_mask, handle, ctx.scale, ctx.impl, ctx.with_lse = inputs
    ctx.save_for_backward(query, key, value, key_mask, handle, *output)
    if type(handle) is torch.Tensor:
        # the plan must outlive this graph, and where checkpointing computes the saved tensors again, the handle among them is
        # that of another plan, which may be gone by then; under a tracer the handle is a stand-in
        ctx.plan = plan_of_handle(handle)


def _grads(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    if not ctx.with_lse:
        raise RuntimeError("with_lse must be True where gradients are wanted, got False")
    query, key, value, key_mask, handle, out, lse = ctx.saved_tensors
    handle = ctx.plan.handle if hasattr(ctx, "plan") else handle
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = block_sparse_backward(grad_out, grad_lse, query, key, value, key_mask, out, lse, handle, ctx.scale, ctx.impl)
    return *grads, None, None, None, None, None


block_sparse_forward.register_autograd(_grads, setup_context=_save)
