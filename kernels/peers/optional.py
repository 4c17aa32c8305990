"""Kernels of other packages behind the same check as ours: what they can serve, and the call as they want it.

    natten        grid windows, any rule of NeighborhoodPattern (windows, strides, dilation, causal axes) with no text
    flashinfer    block lists of full tiles that are runs of the sequence
    spargeattn    the same, in tiles of its own (128 x 64, on Hopper 64 x 128); quantises, so it is not exact

None is required and none is chosen by "auto". `why_not_*` gives the reason, also for a package that is not installed.
"""

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

from genattn.kernels.peers.block_lists import flashinfer_bsr
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.reference.attention import tile_states
from genattn.kernels.triton.config import arch_of
from genattn.kernels.triton.tables import are_runs

PEERS = {"flashinfer": "flashinfer-python", "spargeattn": "spas_sage_attn"}
_MODULES = {"flashinfer": "flashinfer", "spargeattn": "spas_sage_attn", "natten": "natten"}
_HALF = (torch.float16, torch.bfloat16)
_FLASHINFER_WORKSPACE = 128 << 20


@dataclass(frozen=True)
class GridWindows:
    """Neighborhood settings per axis, for NATTEN: 1 to 3 axes."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def density(self) -> float:
        """Share of the scores inside the windows."""
        return math.prod(self.window) / math.prod(self.grid)


def why_not_peer(name: str, query: torch.Tensor, plan: BlockPlan, return_lse: bool = False, masked: bool = False) -> str | None:
    """The reason why `name` of PEERS cannot serve this call, or None."""
    reason = _why_not_package(name, query)
    if reason is not None:
        return reason
    if masked or return_lse:
        return f"{name} is called without key masks and log-sum-exp; use another impl"
    if plan.tail is not None:
        return f"{name} has no stand-in for skipped tiles, the plan asks for tail={plan.tail.kind!r}"
    if plan.fade is not None:
        return f"{name} has no factor per tile pair, the plan lowers logits outside a window"
    if name == "flashinfer" and plan.mask_heads != 1:
        return "its lists must be the same for all heads, this plan has one per head"
    if plan.full_share < 1.0:
        return f"it computes whole tiles only, {1 - plan.full_share:.0%} of this plan's tiles need the element rule"
    if not (are_runs(plan.query_tiles, plan.seqlen_q) and are_runs(plan.key_tiles, plan.seqlen_k)):
        return "its tiles must be runs of the sequence, this plan gathers them"
    if name == "flashinfer" and (plan.seqlen_q % plan.block_q or plan.seqlen_k % plan.block_k):
        return f"its tiles must divide the sequence, got {plan.seqlen_q} x {plan.seqlen_k} in {plan.block_q} x {plan.block_k}"
    tile = (64, 128) if arch_of(query.device) == "sm_90" else (128, 64)
    if name == "spargeattn" and (plan.block_q, plan.block_k) != tile:
        return f"its tiles are {tile[0]} x {tile[1]} here, this plan has {plan.block_q} x {plan.block_k}"
    if name == "spargeattn" and query.shape[-1] not in (64, 128):
        return f"the head dim must be 64 or 128, got {query.shape[-1]}"
    return None


def peer_attention(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, scale: float | None = None
) -> torch.Tensor:
    """[B, Sq, H, D] by the package `name`; call `why_not_peer` first."""
    run = _flashinfer if name == "flashinfer" else _spargeattn
    return run(query, key, value, plan, query.shape[-1] ** -0.5 if scale is None else scale)


def why_not_natten(query: torch.Tensor, windows: GridWindows) -> str | None:
    """The reason why NATTEN cannot serve these windows, or None."""
    reason = _why_not_package("natten", query)
    if reason is not None:
        return reason
    if any(window < 2 or length < 2 for window, length in zip(windows.window, windows.grid)):
        return f"windows and axes must be >= 2, got window {windows.window} on grid {windows.grid}"
    if query.shape[1] != math.prod(windows.grid):
        return f"it serves a grid without text, got {query.shape[1]} tokens for {windows.grid}"
    return None


def natten_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: GridWindows, scale: float | None = None
) -> torch.Tensor:
    """[B, S, H, D] by `natten.na{1,2,3}d`; call `why_not_natten` first."""
    call = getattr(importlib.import_module("natten"), f"na{len(windows.grid)}d")
    # its kernels read other strides silently wrong
    grids = (x.unflatten(1, windows.grid).contiguous() for x in (query, key, value))
    out = call(
        *grids,
        kernel_size=windows.window,
        stride=windows.stride,
        dilation=windows.dilation,
        is_causal=windows.causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return out.flatten(1, len(windows.grid))  # type: ignore[no-any-return]


def _why_not_package(name: str, query: torch.Tensor) -> str | None:
    if name not in _MODULES:
        return f"peers are {', '.join(_MODULES)}, got {name!r}"
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"not installed (pip install {PEERS.get(name, name)})"
    if name == "natten" and query.device.type == "cpu":
        return None  # by its uncompiled flex route: every score is computed
    if query.device.type != "cuda":
        return f"it needs a GPU, got tensors on {query.device.type}"
    if query.dtype not in _HALF:
        return f"the dtype must be float16 or bfloat16, got {query.dtype}"
    return None


def _flashinfer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, scale: float) -> torch.Tensor:
    """Block-sparse rows (BSR): the plan's own lists, one sample at a time; the wrapper is planned once per plan and shape."""
    name = ("flashinfer", query.shape[2:], key.shape[2], query.dtype, scale)
    if name not in plan.cache:
        sparse = importlib.import_module("flashinfer").sparse
        workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=query.device)
        planned = sparse.BlockSparseAttentionWrapper(workspace)
        planned.plan(
            **flashinfer_bsr(plan).of_head(0),
            num_qo_heads=query.shape[2],
            num_kv_heads=key.shape[2],
            head_dim=query.shape[3],
            q_data_type=query.dtype,
            sm_scale=scale,
        )
        plan.cache[name] = planned
    wrapper: Any = plan.cache[name]
    return torch.stack([wrapper.run(*(x[i].contiguous() for x in (query, key, value))) for i in range(query.shape[0])])


def _spargeattn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, scale: float) -> torch.Tensor:
    """Its mask is one number per tile pair, heads first; quantises Q and K to int8, so it is not exact."""
    if "spargeattn" not in plan.cache:
        plan.cache["spargeattn"] = (lasting(tile_states)(plan) > 0).to(torch.int8)
    states: Any = plan.cache["spargeattn"]
    batch, _, heads, _ = query.shape
    call = importlib.import_module("spas_sage_attn").block_sparse_sage2_attn_cuda
    inputs = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    out = call(*inputs, mask_id=states[None].expand(batch, heads, -1, -1).contiguous(), scale=scale)
    return out.transpose(1, 2)  # type: ignore[no-any-return]
