"""Host side of the Triton kernels: what they can serve, their arguments, and the launches.

`forward_arguments` and its two sisters give a launch as a plain dict, so that the same arguments can be run, interpreted
(TRITON_INTERPRET=1) or compiled ahead of time for a chip that is not there.
"""

import importlib.util
import os

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.triton.config import arch_of, launch_of
from genattn.kernels.triton.tables import triton_tables

Arguments = dict[str, object]
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(query: torch.Tensor, plan: BlockPlan, scale: float | None = None) -> str | None:
    """The reason why the Triton kernels cannot serve this call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if query.device.type != "cuda" and not interpreting():
        return f"it needs a GPU, got tensors on {query.device.type}"
    if query.dtype not in TRITON_DTYPES:
        return f"the dtype must be float16, bfloat16 or float32, got {query.dtype}"
    if not 1 <= query.shape[-1] <= 256:
        return f"the head dim must lie in [1, 256], got {query.shape[-1]}"
    if any(b < 16 or b & (b - 1) for b in (plan.block_q, plan.block_k)):
        return f"tile sizes must be powers of two >= 16, got {plan.block_q} and {plan.block_k}"
    if scale is not None and scale <= 0:
        return f"scale must be > 0, got {scale}"
    if plan.tail is not None:
        return f"its kernels do not stand in for skipped tiles yet, the plan asks for tail={plan.tail.kind!r}"
    return None


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    value_mix: torch.Tensor | None = None,
    frame_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as in `reference_attention`, lse float32.

    value_mix: float [H], out becomes lerp(out, value, u) per head (self-attention only). frame_lse: float32
    [B, Sq, H, frames], filled with -inf by the caller; receives the log-sum-exp over the keys of each grid frame.
    """
    from genattn.kernels.triton.forward_kernel import forward_kernel

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not plan.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    arguments = forward_arguments(query, key, value, out, lse, plan, scale, key_mask, value_mix, frame_lse)
    forward_kernel[forward_grid(query, plan)](**arguments)
    return out, lse


def triton_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; deterministic."""
    from genattn.kernels.triton.backward_kernel import delta_kernel, dkv_kernel, dq_kernel

    query, key, value, out, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, out, grad_out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    batch, seqlen, heads, _ = query.shape
    block = 64
    delta_kernel[(-(-seqlen // block), batch * heads)](**delta_arguments(out, grad_out, grad_lse, delta, block))
    dq = dq_arguments(query, key, value, grad_out, lse, delta, grads[0], plan, scale, key_mask)
    dq_kernel[(plan.query_tiles.shape[0], batch * heads)](**dq)
    dkv = dkv_arguments(query, key, value, grad_out, lse, delta, grads[1], grads[2], plan, scale, key_mask)
    dkv_kernel[(plan.key_tiles.shape[0], batch * key.shape[2])](**dkv)
    return grads[0], grads[1], grads[2]


def forward_grid(query: torch.Tensor, plan: BlockPlan, persistent: int | None = None) -> tuple[int, int]:
    """Programs of `forward_kernel`: one per tile and head, or a few per processor that share them out (see `Launch`)."""
    tiles, pairs = plan.query_tiles.shape[0], query.shape[0] * query.shape[2]
    if persistent is None:
        persistent = launch_of("forward", arch_of(query.device), query.shape[-1], plan.block_k).persistent
    if not persistent:
        return tiles, pairs
    return min(tiles * pairs, persistent * processors(query.device)), 1


def processors(device: torch.device) -> int:
    """Processors of a GPU; 2 where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    value_mix: torch.Tensor | None = None,
    frame_lse: torch.Tensor | None = None,
    arch: str | None = None,
) -> Arguments:
    """Every argument of `forward_kernel`, launch settings included."""
    tables = triton_tables(plan)
    launch = launch_of("forward", arch or arch_of(query.device), query.shape[-1], plan.block_k)
    return {
        **_tensors(query, key, value, plan, scale, key_mask),
        "OUT": out,
        "LSE": lse,
        "MIX": lse if value_mix is None else value_mix,
        "FRAME_LSE": lse if frame_lse is None else frame_lse,
        "ROW_PTR": plan.row_ptr,
        "COLUMNS": plan.columns,
        "NUM_FULL": plan.num_full,
        "ORDER": tables.order,
        **strides_of("o", out),
        "QUERY_SCALES": lse,
        "KEY_SCALES": lse,
        "INT8": False,
        "tiles_q": plan.query_tiles.shape[0],
        "tiles_k": plan.key_tiles.shape[0],
        "HOLES": tables.holes or key_mask is not None,
        "HAS_MIX": value_mix is not None,
        "HAS_FRAMES": frame_lse is not None,
        "pairs": query.shape[0] * query.shape[2],
        "PERSISTENT": launch.persistent > 0,
        **_launch("forward", arch or arch_of(query.device), query.shape[-1], plan.block_k),
    }


def delta_arguments(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor, block: int
) -> Arguments:
    """Every argument of `delta_kernel`."""
    dim = out.shape[-1]
    return {
        "OUT": out,
        "DO": grad_out,
        "DLSE": delta if grad_lse is None else grad_lse.float().contiguous(),
        "DELTA": delta,
        **strides_of("o", out),
        **strides_of("d", grad_out),
        "seqlen": out.shape[1],
        "heads": out.shape[2],
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK": block,
        "HAS_DLSE": grad_lse is not None,
        "num_warps": 4,
    }


def dq_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_query: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    arch: str | None = None,
) -> Arguments:
    """Every argument of `dq_kernel`."""
    tables = triton_tables(plan)
    return {
        **_tensors(query, key, value, plan, scale, key_mask),
        "DO": grad_out,
        "LSE": lse,
        "DELTA": delta,
        "DQ": grad_query,
        "ROW_PTR": plan.row_ptr,
        "COLUMNS": plan.columns,
        "NUM_FULL": plan.num_full,
        "ORDER": tables.order,
        **strides_of("d", grad_out),
        **strides_of("g", grad_query),
        "tiles_q": plan.query_tiles.shape[0],
        "HOLES": tables.holes or key_mask is not None,
        **_launch("dq", arch or arch_of(query.device), query.shape[-1], plan.block_k),
    }


def dkv_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    arch: str | None = None,
) -> Arguments:
    """Every argument of `dkv_kernel`; grad_key and grad_value share their strides."""
    inverse = plan.transposed
    entry = plan.cache.setdefault("entry", plan.transposed_order.to(torch.int32))
    return {
        **_tensors(query, key, value, plan, scale, key_mask),
        "DO": grad_out,
        "LSE": lse,
        "DELTA": delta,
        "DK": grad_key,
        "DV": grad_value,
        "ENTRY": entry,
        "ROW_PTR": inverse.row_ptr,
        "COLUMNS": inverse.columns,
        "NUM_FULL": inverse.num_full,
        "ORDER": triton_tables(plan).order_k,
        **strides_of("d", grad_out),
        **strides_of("g", grad_key),
        "tiles_k": plan.key_tiles.shape[0],
        **_launch("dkv", arch or arch_of(query.device), query.shape[-1], plan.block_q),
    }


def _tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> Arguments:
    """What the three kernels share: inputs, tiles, rule and sizes."""
    tables = triton_tables(plan)
    grid, dim = tables.grid, query.shape[-1]
    longest_offset = max(x.stride(1) * x.shape[1] for x in (query, key, value))
    return {
        "Q": query,
        "K": key,
        "V": value,
        "QUERY_TILES": plan.query_tiles,
        "KEY_TILES": plan.key_tiles,
        "KEY_MASK": plan.columns if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "COORDS": tables.words,
        "CLASSES": grid.frame_class,
        "LOW": grid.low,
        "WIDTH": grid.width,
        "FRAME_SPAN": tables.frame_span,
        "BITS": tables.bits,
        "SLOTS": tables.slots,
        "scale": dim**-0.5 if scale is None else scale,
        **strides_of("q", query),
        **strides_of("k", key),
        **strides_of("v", value),
        "seqlen_q": query.shape[1],
        "seqlen_k": key.shape[1],
        "heads": query.shape[2],
        "group": query.shape[2] // key.shape[2],
        "nnz": plan.columns.numel(),
        "frames": grid.frame_class.shape[-1],
        "classes": grid.low.shape[1],
        "longest": grid.low.shape[3],
        "extent_y": grid.extent[0],
        "extent_x": grid.extent[1],
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK_Q": plan.block_q,
        "BLOCK_K": plan.block_k,
        "LISTS": plan.num_heads,
        "RULE": tables.rule,
        "RULE_HEADS": grid.num_heads,
        "SLOT_ROWS": tables.slots.shape[0],
        "RUNS_Q": tables.runs_q,
        "RUNS_K": tables.runs_k,
        "MASKED": key_mask is not None,
        "WIDE": longest_offset >= 1 << 31,
        "DIL_Y": grid.dilation[0],
        "DIL_X": grid.dilation[1],
        "CIRC_Y": grid.circular[0],
        "CIRC_X": grid.circular[1],
        "PRECISION": precision_of(query),
    }


def strides_of(name: str, tensor: torch.Tensor) -> Arguments:
    """Strides of batch, sequence and heads as arguments `<name>_b`, `<name>_s`, `<name>_h`."""
    return {f"{name}_{axis}": tensor.stride(place) for place, axis in enumerate("bsh")}


def _launch(kernel: str, arch: str, dim: int, block: int) -> Arguments:
    launch = launch_of(kernel, arch, dim, block)
    return {"num_warps": launch.warps, "num_stages": launch.stages, "SPLIT": launch.split, "FINE": launch.fine}


def padded(dim: int) -> int:
    """Next power of two, at least 16: what a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def precision_of(query: torch.Tensor) -> str:
    """Precision of the products, as `tl.dot` takes it."""
    # fp32 without tensor cores spills its way to a crawl; three tf32 products keep about 21 bits of the mantissa
    split = query.dtype == torch.float32 and query.is_cuda and torch.version.hip is None
    return "tf32x3" if split else "ieee"
