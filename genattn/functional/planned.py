"""From a pattern to a plan, and from a plan to attention: the backend, the tile sizes, the kinds of plan."""

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import as_autocast, block_sparse_attention, under_transform, working_dtype
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


def plan_for(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    impl: str = "auto",
    memory: SiteMemory | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> AnyPlan:
    """The plan of `pattern` with the tile sizes that suit the device of `query` and the length of the sequence.

    Boxes that follow the query tile for impl="halo", windows for "natten", else lists of fixed tiles. For patterns that choose
    by content: memory is what this attention site keeps between the calls of a run, scale that of the scores, and key_mask,
    bool [B, S], hides keys.
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
    query, key = _chosen_from(query), _chosen_from(key)
    # what is chosen outlives the call: it may have come in inference mode, or under another default device
    return lasting(pattern.plan_for)(query, key, layout, *sides, memory=memory, scale=scale, key_mask=key_mask).to(query.device)


def _chosen_from(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside of transforms of torch.func: a choice has no gradient. Raises GenAttnError under vmap."""
    while under_transform(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise GenAttnError(
                "a pattern that chooses by content must see each entry's own queries and keys, which torch.vmap hides; "
                "give the entries as a batch"
            )
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


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
