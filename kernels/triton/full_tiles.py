"""Host side of the kernel for full tiles: "triton-full", for plans without partial tiles; taken by name only.

It is there to be measured: on Hopper a loop over full tiles can be split among specialised groups of four warps, one loading
while the others multiply. Radial's strips are such tiles; boxes and windows with partial tiles go to "triton".
"""

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.triton.block_sparse import empty_results, interpreting, precision_of, why_not_triton
from genattn.kernels.triton.launch import Arguments, launch, strides_of
from genattn.kernels.triton.tables import triton_tables

_STAGES = 2
_WARPS = 4  # with 8 the compiler ignores the request


def why_not_full_tiles(query: torch.Tensor, plan: BlockPlan, scale: float | None = None) -> str | None:
    """The reason why the kernel cannot serve this call, or None."""
    reason = why_not_triton(query, plan, scale)
    if reason is not None:
        return reason
    if plan.tail is not None:
        return f"it stands in for no skipped tiles, the plan asks for tail={plan.tail.kind!r}; use 'triton'"
    if plan.fade is not None:
        return "it has no factor per tile pair, the plan lowers logits outside a window; use 'triton'"
    dim = query.shape[-1]
    if query.dtype == torch.float32 and not interpreting():
        return "it is for float16 and bfloat16"
    if dim < 16 or dim & (dim - 1):
        return f"the head dim must be a power of two >= 16, got {dim}"
    if int(plan.num_full.sum()) != plan.columns.numel():
        return "some tiles of the plan are partial; use 'triton'"
    if first_tokens(plan) is None:
        return "some tiles of the plan are no runs of the sequence; use 'triton'"
    if query.requires_grad and torch.is_grad_enabled():
        return "it has no backward; use 'triton'"
    if query.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(query.device) < (9, 0)):
        return "it needs tensor descriptors in hardware: compute capability 9.0 or later"
    return None


def first_tokens(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(first tokens of the query tiles, tokens in each, first tokens of the key tiles), int32; None unless each tile is a run
    of the sequence with its unused lanes behind, and holds some token. Kept in the plan."""
    if "runs" not in plan.cache:
        runs = [_run(tiles) for tiles in (plan.query_tiles, plan.key_tiles)]
        found = None if None in runs else (runs[0][0], runs[0][1], runs[1][0])  # type: ignore[index]
        plan.cache["runs"] = found
    return plan.cache["runs"]  # type: ignore[return-value]


def _run(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    lanes = torch.arange(tiles.shape[1], dtype=tiles.dtype, device=tiles.device)
    counts = (tiles >= 0).sum(1, dtype=torch.int32)
    wanted = torch.where(lanes < counts[:, None], tiles[:, :1] + lanes, -1)
    whole = torch.equal(wanted, tiles) and bool((counts > 0).all())
    return (tiles[:, 0].to(torch.int32).contiguous(), counts) if whole else None


def full_tiles_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as in `triton_forward`. Raises ValueError under a key mask."""
    import triton
    from genattn.kernels.triton.full_tiles_kernel import full_tiles_kernel

    if key_mask is not None:
        raise ValueError("impl='triton-full' serves no key mask: a hidden key makes its tile partial; use impl='triton'")
    # a descriptor wants rows that begin at multiples of 16 bytes
    query, key, value = (x if _describable(x) else x.contiguous() for x in (query, key, value))
    out, lse = empty_results(query, plan)
    if query.is_cuda:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=query.device))
    grid = plan.query_tiles.shape[0], query.shape[0] * query.shape[2]
    launch(full_tiles_kernel, grid, full_tiles_arguments(query, key, value, out, lse, plan, scale), query)
    return out, lse


def full_tiles_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
) -> Arguments:
    """Every argument of `full_tiles_kernel`, launch settings included."""
    runs, tables = first_tokens(plan), triton_tables(plan)
    assert runs is not None
    return {
        "QUERY_FIRST": runs[0],
        "QUERY_COUNTS": runs[1],
        "KEY_FIRST": runs[2],
        "KEY_COUNTS": tables.keys.counts,
        "HOLES": tables.keys.holes,
        "LEAST": tables.keys.least,
        **{"Q": query, "K": key, "V": value, "OUT": out, "LSE": lse},
        "ROW_PTR": plan.row_ptr,
        "COLUMNS": plan.columns,
        "ORDER": tables.order,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        **strides_of("q", query),
        **strides_of("k", key),
        **strides_of("v", value),
        **strides_of("o", out),
        "seqlen_q": query.shape[1],
        "seqlen_k": key.shape[1],
        "heads": query.shape[2],
        "group": query.shape[2] // key.shape[2],
        "tiles_q": plan.query_tiles.shape[0],
        "DIM": query.shape[-1],
        "BLOCK_Q": plan.block_q,
        "BLOCK_K": plan.block_k,
        "LISTS": plan.num_heads,
        "SPECIALISED": True,
        "STAGES": _STAGES,
        "PRECISION": precision_of(query),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }


def _describable(tensor: torch.Tensor) -> bool:
    size = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(n * size % 16 == 0 for n in (tensor.stride(0), tensor.stride(1), tensor.stride(2)))
    )
