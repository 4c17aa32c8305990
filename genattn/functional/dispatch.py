"""Attention under a pattern, as a plain function of tensors: the one call below everything else.

out = attention(query, key, value, RadialPattern(), TokenLayout.from_grid((21, 30, 52), text_after=0))
out = attention(query, key, value, "radial", grid=(21, 30, 52), text_after=226, tail="mean")
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.functional.asked import OWN_TAIL, asked_layout, asked_pattern
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import as_autocast, block_sparse_attention, choose_impl, working_dtype
from genattn.kernels.failures import failure_of
from genattn.kernels.operators import OP_IMPLS
from genattn.kernels.peers.optional import GridWindows, natten_attention, why_not_natten
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.freed import GIVE_BACK, give_back
from genattn.kernels.plan.halo_plan import HaloPlan, check_halo_inputs, halo_attention
from genattn.kernels.plan.head_tiles import HeadTiles, check_head_tiles
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.triton.block_sparse import SERVES_TAIL
from genattn.kernels.triton.config import tile_sizes
from genattn.kernels.triton.halo import refuse_from_now_on, triton_halo_attention, why_not_triton_halo
from genattn.patterns.halo import halo_plan
from genattn.patterns.natten_windows import natten_windows
from genattn.patterns.pattern import Pattern, SiteMemory

AnyPlan = BlockPlan | HeadTiles | HaloPlan | GridWindows


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern | str | Mapping[str, Any],
    layout: TokenLayout | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    *,
    grid: Sequence[int] | None = None,
    text_before: int = 0,
    text_after: int = 0,
    tail: str | None = OWN_TAIL,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention in which `pattern` says which token of the sequence sees which.

    Args:
        query: [B, S, H, D], any strides; float16, bfloat16, float32, or float64.
        key: [B, S, Hk, D] with Hk a divisor of H (grouped queries).
        value: the same.
        pattern: a Pattern; its description as a file holds it, {"type": "RadialPattern", "decay": 0.2}; or the name "radial",
            "gna", "adaptive", "profile:PATH", or "auto", which is dense where a sparse call would not be faster. A pattern that
            chooses by content does so for each entry of the batch.
        layout: the tokens of the sequence, S = layout.seqlen. Give this or `grid`.
        impl: "auto", the name of a backend (`genattn.kernels.block_sparse.IMPLS`), or, for a NeighborhoodPattern, "halo" (key
            boxes that follow the query tile) or "natten" (where it is installed).
        return_lse: also return the log-sum-exp.
        scale: of the scores, None for D ** -0.5.
        key_mask: bool [B, S], False hides a key of one sample (padded text).
        grid: 1 to 3 axes (frames, height, width), in raster order, for a sequence of text, grid, text.
        text_before: tokens before the grid that see and are seen by all.
        text_after: tokens after it.
        tail: what stands in for skipped key tiles: "pattern" for the pattern's own setting, None for nothing, "mean", "mean2",
            "mean4", or "measured" for what came out best for the pattern on models trained dense.

    Returns:
        [B, S, H, D], or with return_lse also lse [B, S, H] (natural log, float32; float64 for float64).
        A query that sees nothing gets zeros and -inf.

    Raises:
        GenAttnError: with the reason, when the named backend cannot serve, when shapes do not fit the layout or the grid, or
            for an unknown pattern or tail.
    """
    if query.ndim != 4:
        raise GenAttnError(f"query must be [B, S, H, D], got {tuple(query.shape)}")
    layout = asked_layout(query.shape[1], layout, grid, text_before, text_after)
    if query.shape[1] != layout.seqlen:
        raise GenAttnError(
            f"query must be [B, S, H, D] with S = {layout.seqlen} for the layout {layout.describe()!r}, "
            f"got {tuple(query.shape)}"
        )
    asked = asked_pattern(pattern, tail, query, layout)
    query, key, value = as_autocast(query, key, value)
    flags: dict[str, Any] = {"impl": impl, "return_lse": return_lse, "scale": scale}
    if asked.needs_tensors and query.shape[0] > 1:
        return _each_entry(query, key, value, asked, layout, key_mask, **flags)
    plan = plan_for(query, key, asked, layout, impl, scale=scale)
    return planned_attention(query, key, value, plan, key_mask=key_mask, **flags)


def _each_entry(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    key_mask: torch.Tensor | None,
    **flags: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every entry of the batch by the tiles that it chose itself."""
    if key_mask is not None:
        key_mask = key_mask.expand(query.shape[0], -1)
    found: list[Any] = []
    for entry in range(query.shape[0]):
        some = slice(entry, entry + 1)
        plan = plan_for(query[some], key[some], pattern, layout, flags["impl"], scale=flags["scale"])
        mask = None if key_mask is None else key_mask[some]
        found.append(planned_attention(query[some], key[some], value[some], plan, key_mask=mask, **flags))
    if not flags["return_lse"]:
        return torch.cat(found)
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def planned_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AnyPlan,
    impl: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` for a plan that is there already, from `plan_for`. Under autocast the tensors are cast as SDPA casts them."""
    query, key, value = as_autocast(query, key, value)
    if isinstance(plan, HaloPlan):
        return _halo(query, key, value, plan, return_lse, scale, key_mask)
    if isinstance(plan, GridWindows) and return_lse:
        raise GenAttnError(f"impl={impl!r} returns no log-sum-exp; use return_lse=False or another impl")
    if isinstance(plan, GridWindows):
        reason = "a key mask is given" if key_mask is not None else why_not_natten(query, plan)
        if reason is not None:
            raise GenAttnError(f"impl='natten' cannot serve this call: {reason}; use impl='auto'")
        return natten_attention(query, key, value, plan, scale)
    if isinstance(plan, HeadTiles):
        return _head_tiles(query, key, value, plan, impl, return_lse, scale, key_mask)
    try:
        out = block_sparse_attention(query, key, value, plan, scale=scale, key_mask=key_mask, return_lse=return_lse, impl=impl)
    except ValueError as error:
        raise GenAttnError(str(error)) from error
    if not torch.compiler.is_compiling() and plan.cache.pop(GIVE_BACK, False):
        give_back()
    return out


def _head_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HeadTiles,
    impl: str,
    return_lse: bool,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The heads laid into the sequence, so that each has tiles of its own."""
    try:
        check_head_tiles(query, key, value, plan)
    except ValueError as error:
        raise GenAttnError(str(error)) from error
    q, k, v = (plan.fold(x) for x in (query, key, value))
    found = planned_attention(q, k, v, plan.folded, impl, return_lse, scale, plan.fold_mask(key_mask))
    return tuple(plan.unfold(x) for x in found) if isinstance(found, tuple) else plan.unfold(found)  # type: ignore[return-value]


def _halo(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HaloPlan,
    return_lse: bool,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The haloed-box kernel where it serves, else tensor operations."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    reason = why_not_triton_halo(query, plan.to(query.device), wants_gradient)
    if reason is None and not torch.compiler.is_compiling():
        check_halo_inputs(query, key, plan)
        try:
            out, lse = triton_halo_attention(query, key, value, plan, scale=scale, key_mask=key_mask)
            return (out, lse) if return_lse else out
        except Exception as error:
            failure = failure_of("halo", error)
            if failure is None:
                raise
            reason = failure.reason
            refuse_from_now_on(plan.to(query.device), reason)
    if return_lse:
        raise GenAttnError(f"impl='halo' returns no log-sum-exp here: {reason}; use return_lse=False or another impl")
    return halo_attention(query, key, value, plan, scale, key_mask)


def explain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, layout: TokenLayout, impl: str = "auto"
) -> tuple[str, dict[str, str]]:
    """What `attention` would run for these tensors, and why not each backend it passed over."""
    plan = plan_for(query, key, pattern, layout)
    if isinstance(plan, HeadTiles):
        query, key, value = (plan.fold(x) for x in (query, key, value))
        plan = plan.folded
    assert isinstance(plan, BlockPlan)
    return choose_impl(query, key, value, plan, impl=impl)


def plan_for(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    impl: str = "auto",
    memory: SiteMemory | None = None,
    scale: float | None = None,
) -> AnyPlan:
    """The plan of `pattern` with the tile sizes that suit the device of `query` and the length of the sequence.

    Boxes that follow the query tile for impl="halo", windows for "natten", else lists of fixed tiles. memory: what this
    attention site keeps between the calls of a run, and scale: of the scores, for patterns that choose by content.
    """
    if impl == "halo":
        return halo_plan(pattern, layout)
    if impl == "natten":
        return natten_windows(pattern, layout)
    block = tile_size(layout.seqlen, query.device.type)
    most_q, most_k = tile_sizes(query.device, query.shape[-1], working_dtype(query))
    sides = min(block, most_q), min(block, most_k)
    if not pattern.needs_tensors:
        return pattern.plan_for(query, key, layout, *sides).to(query.device)
    # what is chosen outlives the call: it may have come in inference mode, or under another default device
    return lasting(pattern.plan_for)(query, key, layout, *sides, memory=memory, scale=scale).to(query.device)


def block_plan_for(query: torch.Tensor, key: torch.Tensor, pattern: Pattern, layout: TokenLayout) -> BlockPlan:
    """`plan_for` where one list of tiles for all heads is needed. Raises GenAttnError for clusters, whose tiles differ."""
    plan = plan_for(query, key, pattern, layout)
    if not isinstance(plan, BlockPlan):
        raise GenAttnError("this needs a plan with the same tiles for all heads, got clusters; use tiles='boxes'")
    return plan


def why_no_tail(impl: str, device: torch.device) -> str | None:
    """The reason why `impl` does not serve plans with a tail on a device at its usual speed, or None."""
    if impl not in ("auto", *OP_IMPLS, "flex", "sdpa", "reference"):
        return f"impl={impl!r} has no stand-in for skipped tiles"
    if device.type == "cuda" and not SERVES_TAIL:
        return "the Triton kernels have no stand-in for skipped tiles yet"
    return None


def tile_size(seqlen: int, device: str) -> int:
    """Tokens per tile side: 128 for long sequences; smaller where a few tiles of 128 would hold every pair and skip nothing."""
    smallest = 16 if device == "cpu" else 64  # a GPU's matrix units want 64 rows
    return max(smallest, min(128, 1 << max(1, seqlen // 32).bit_length() - 1))
