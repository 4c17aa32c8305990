"""Attention under a pattern, as a plain function of tensors: the one call below everything else.

out = attention(query, key, value, RadialPattern(), TokenLayout.from_grid((21, 30, 52), text_after=0))
out = attention(query, key, value, "radial", grid=(21, 30, 52), text_after=226, tail="mean")
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.functional.asked import OWN_TAIL, asked_layout, asked_pattern
from genattn.functional.each_sample import attention_of_each, rows_of_samples
from genattn.functional.planned import AnyPlan, plan_for, planned_attention
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import as_autocast, choose_impl
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.patterns.pattern import Pattern
from genattn.selection.seen import check_key_mask


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
        key_mask: bool [B, S], False hides a key of one sample (padding): from every query, and from a choice by content. What
            stands there may be anything, Inf and NaN too.
        grid: 1 to 3 axes (frames, height, width), in raster order, for a sequence of text, grid, text.
        text_before: tokens before the grid that see and are seen by all.
        text_after: tokens after it.
        tail: what stands in for skipped key tiles: "pattern" for the pattern's own setting, None for nothing, "mean", "mean2",
            or "measured" for what came out best for the pattern on models trained dense.

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
    check_key_mask(key_mask, key)
    asked = asked_pattern(pattern, tail, query, layout)
    query, key, value = as_autocast(query, key, value)
    flags: dict[str, Any] = {"impl": impl, "return_lse": return_lse, "scale": scale}
    if not asked.needs_tensors or query.shape[0] == 1:
        plan = plan_for(query, key, asked, layout, impl, scale=scale, key_mask=key_mask)
        return planned_attention(query, key, value, plan, key_mask=key_mask, **flags)

    def plan_of(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, number: int) -> AnyPlan:
        return plan_for(q, k, asked, layout, impl, scale=scale, key_mask=mask)

    entries = rows_of_samples(query.shape[0], None)
    return attention_of_each(query, key, value, entries, plan_of, key_mask, **flags)[0]


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
