"""Host side of the Triton kernels: what they can serve, their arguments, and the launches.

`forward_arguments` and its two sisters give a launch as a plain dict, so that the same arguments can be run, interpreted
(TRITON_INTERPRET=1) or compiled ahead of time for a chip that is not there.
"""

import importlib.util
import os

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.exact import exact
from genattn.kernels.reference.tail import TailKeys
from genattn.kernels.triton.config import Launch, arch_of, launch_of, most_lanes
from genattn.kernels.triton.fade import fade_arguments
from genattn.kernels.triton.launch import Arguments, alignment, is_wide, launch, padded, strides_of
from genattn.kernels.triton.tables import inverse_tables, masked_keys, triton_tables, why_not_masks
from genattn.kernels.triton.tail import add_tail_gradients, pseudo_keys, tail_arguments

SERVES_TAIL = True  # whether plans with a tail run here; patterns leave theirs off on GPUs where they do not
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)  # before it, 16-bit products on bfloat16 and asynchronous copies are not there


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(query: torch.Tensor, plan: BlockPlan, scale: float | None = None) -> str | None:
    """The reason why the Triton kernels cannot serve this call, or None."""
    dim = query.shape[-1]
    reason = why_not_launch(query)
    if reason is not None:
        return reason
    if any(b < 16 or b & (b - 1) for b in (plan.block_q, plan.block_k)):
        return f"tile sizes must be powers of two >= 16, got {plan.block_q} and {plan.block_k}"
    if scale is not None and scale <= 0:
        return f"scale must be > 0, got {scale}"
    if plan.tail is not None and not SERVES_TAIL:
        return f"its kernels do not stand in for skipped tiles, the plan asks for tail={plan.tail.kind!r}"
    arch = arch_of(query.device)
    most_q, most_k = most_lanes(arch, dim, query.dtype)
    if plan.block_q > most_q or plan.block_k > most_k:
        return (
            f"{arch} holds tiles of at most {most_q} x {most_k} tokens in {query.dtype} at head dim {dim}, "
            f"got {plan.block_q} x {plan.block_k}; build the plan with tile_sizes(device, head_dim, dtype)"
        )
    return why_not_masks(plan, query.device)


def why_not_launch(query: torch.Tensor) -> str | None:
    """The reason why no kernel of ours can run on these tensors, whatever the plan, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if query.device.type != "cuda" and not interpreting():
        return f"it needs a GPU, got tensors on {query.device.type}"
    if query.dtype not in TRITON_DTYPES:
        return f"the dtype must be float16, bfloat16 or float32, got {query.dtype}"
    if not 1 <= query.shape[-1] <= 256:
        return f"the head dim must lie in [1, 256], got {query.shape[-1]}"
    if query.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < _LEAST_CAPABILITY:
            return f"the kernels need compute capability 8.0 (A100, RTX 30) or later, got {capability[0]}.{capability[1]}"
    return None


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as in `reference_attention`, lse float32."""
    from genattn.kernels.triton.forward_kernel import forward_kernel

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = empty_results(query, plan)
    pseudo = pseudo_keys(key, value, plan, key_mask)
    arguments = forward_arguments(query, key, value, out, lse, plan, scale, key_mask, pseudo=pseudo)
    launch(forward_kernel, forward_grid(query, plan), arguments, query)
    return out, lse


def empty_results(query: torch.Tensor, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for a kernel to fill; 0 and -inf where the plan has queries that stand in no tile."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not plan.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    return out, lse


@exact
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
    launch(delta_kernel, (-(-seqlen // block), batch * heads), delta_arguments(out, grad_out, grad_lse, delta, block), query)
    pseudo = pseudo_keys(key, value, plan, key_mask)
    dq = dq_arguments(query, key, value, grad_out, lse, delta, grads[0], plan, scale, key_mask, pseudo=pseudo)
    launch(dq_kernel, (plan.query_tiles.shape[0], batch * heads), dq, query)
    dkv = dkv_arguments(query, key, value, grad_out, lse, delta, grads[1], grads[2], plan, scale, key_mask)
    launch(dkv_kernel, (plan.key_tiles.shape[0], batch * key.shape[2]), dkv, query)
    if pseudo is not None:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        precision = precision_of(query)
        add_tail_gradients(grads, grad_out, query, lse, delta, pseudo, plan, factor, key_mask, precision)
    return grads[0], grads[1], grads[2]


def forward_grid(query: torch.Tensor, plan: BlockPlan, persistent: int | None = None) -> tuple[int, int]:
    """Programs of `forward_kernel`: one per tile and head, or a few per processor that share them out (see `Launch`)."""
    tiles, pairs = plan.query_tiles.shape[0], query.shape[0] * query.shape[2]
    if persistent is None:
        persistent = _launch_of("forward", arch_of(query.device), query, plan).persistent
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
    arch: str | None = None,
    pseudo: TailKeys | None = None,
) -> Arguments:
    """Every argument of `forward_kernel`, launch settings included. pseudo: the pseudo-keys of a plan with a tail."""
    return {
        **_tensors(query, key, value, plan, scale, key_mask, arch, out),
        **tail_arguments(pseudo, plan, query.shape[-1] ** -0.5 if scale is None else scale, lse),
        "OUT": out,
        "LSE": lse,
        **_lists(plan),
        **strides_of("o", out),
        "QUERY_SCALES": lse,
        "KEY_SCALES": lse,
        "INT8": False,
        "tiles_k": plan.key_tiles.shape[0],
        "pairs": query.shape[0] * query.shape[2],
        "PERSISTENT": _launch_of("forward", arch or arch_of(query.device), value, plan).persistent > 0,
        **_launch("forward", arch, value, plan, key_mask),
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
        "ALIGN": alignment(out, grad_out),
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
    pseudo: TailKeys | None = None,
) -> Arguments:
    """Every argument of `dq_kernel`."""
    return {
        **_tensors(query, key, value, plan, scale, key_mask, arch, grad_out, grad_query),
        **tail_arguments(pseudo, plan, query.shape[-1] ** -0.5 if scale is None else scale, lse),
        "DO": grad_out,
        "LSE": lse,
        "DELTA": delta,
        "DQ": grad_query,
        **_lists(plan),
        **strides_of("d", grad_out),
        **strides_of("g", grad_query),
        **_launch("dq", arch, query, plan, key_mask),
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
    """Every argument of `dkv_kernel`; grad_key and grad_value share their strides and are zero."""
    inverse = inverse_tables(plan)
    return {
        **_tensors(query, key, value, plan, scale, key_mask, arch, grad_out, grad_key),
        "DO": grad_out,
        "LSE": lse,
        "DELTA": delta,
        "DK": grad_key,
        "DV": grad_value,
        "ENTRY": inverse.entry,
        "ROW_PTR": inverse.row_ptr,
        "COLUMNS": inverse.columns,
        "NUM_FULL": inverse.num_full,
        "ORDER": inverse.order,
        **strides_of("d", grad_out),
        **strides_of("g", grad_key),
        "tiles_k": plan.key_tiles.shape[0],
        **_launch("dkv", arch, query, plan, key_mask),
    }


def _lists(plan: BlockPlan) -> Arguments:
    return {
        "ROW_PTR": plan.row_ptr,
        "COLUMNS": plan.columns,
        "NUM_FULL": plan.num_full,
        "ORDER": triton_tables(plan).order,
        "tiles_q": plan.query_tiles.shape[0],
    }


def _tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    arch: str | None,
    *others: torch.Tensor,
) -> Arguments:
    """What the three kernels share: inputs, tiles, rule and sizes. others: whatever else is read or written by rows."""
    tables = triton_tables(plan)
    dim = query.shape[-1]
    return {
        "Q": query,
        "K": key,
        "V": value,
        "QUERY_TILES": tables.query_lanes,
        **_key_tiles(plan, key_mask),
        "WORDS_Q": tables.words_q,
        "CLASSES": tables.frame_class,
        "LOW": tables.low,
        "WIDTH": tables.width,
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
        "frames": tables.frame_class.shape[-1],
        "classes": tables.low.shape[1],
        "longest": tables.low.shape[3],
        "extent_y": tables.extent[0],
        "extent_x": tables.extent[1],
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK_Q": plan.block_q,
        "BLOCK_K": plan.block_k,
        "LISTS": plan.num_heads,
        "RULE": tables.rule,
        "RULE_HEADS": tables.frame_class.shape[0],
        "SLOT_ROWS": tables.slots.shape[0],
        "RUNS_Q": tables.runs_q,
        "RUNS_K": tables.runs_k and key_mask is None,
        "WIDE": is_wide(query, key, value, *others),
        "ALIGN": alignment(query, key, value, *others),
        "DIL_Y": tables.dilation[0],
        "DIL_X": tables.dilation[1],
        "CIRC_Y": tables.circular[0],
        "CIRC_X": tables.circular[1],
        "PRECISION": precision_of(query, arch),
        **fade_arguments(plan),
    }


def _key_tiles(plan: BlockPlan, key_mask: torch.Tensor | None) -> Arguments:
    """What a loop reads of the key tiles. A key mask becomes tiles, words and counts per sample, so that no loop has a mask."""
    tables = triton_tables(plan)
    keys = tables.keys if key_mask is None else masked_keys(tables, key_mask)
    per_sample = key_mask is not None
    return {
        "KEY_TILES": keys.lanes,
        "WORDS_K": keys.words,
        "KEY_COUNTS": keys.counts,
        "tiles_b": plan.key_tiles.numel() if per_sample else 0,
        "counts_b": plan.key_tiles.shape[0] if per_sample else 0,
        "HOLES": keys.holes,
        "LEAST": keys.least,
        "GUARDED": keys.may_be_empty,
    }


def _launch_of(kernel: str, arch: str, query: torch.Tensor, plan: BlockPlan, masked: bool = False) -> Launch:
    masked = masked or plan.tail is not None or triton_tables(plan).rule == 2
    return launch_of(kernel, arch, query.shape[-1], plan.block_q, plan.block_k, query.dtype, masked)


def _launch(kernel: str, arch: str | None, query: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None) -> Arguments:
    found = _launch_of(kernel, arch or arch_of(query.device), query, plan, key_mask is not None)
    return {"num_warps": found.warps, "num_stages": found.stages, "SPLIT": found.split, "FINE": found.fine}


def precision_of(query: torch.Tensor, arch: str | None = None) -> str:
    """Precision of the products, as `tl.dot` takes it; arch: of a chip that is not the one `query` is on."""
    # fp32 without tensor cores spills its way to a crawl; three tf32 products keep about 21 bits of the mantissa
    split = query.dtype == torch.float32 and (arch or arch_of(query.device)).startswith("sm_")
    return "tf32x3" if split else "ieee"
