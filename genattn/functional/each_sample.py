"""A batch whose samples have a plan each: what a pattern chooses by content is then no matter of what else is in the batch."""

from collections.abc import Callable
from typing import Any

import torch

from genattn.functional.planned import AnyPlan, planned_attention
from genattn.geometry.token_layout import TokenLayout

PlanOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], AnyPlan]


def rows_of_samples(batch: int, samples: int | None, passes: int | None = None) -> list[torch.Tensor]:
    """The entries of each sample in a batch of sequences, int64; each entry alone where the samples are not known.

    Entries are ordered by guidance pass, then sample, then what is folded into the batch (frames of a spatial attention).
    passes: in this batch; None: nothing is folded in.
    """
    if samples is None or batch % (samples * (passes or 1)):
        return list(torch.arange(batch).split(1))
    order = torch.arange(batch).view(passes or batch // samples, samples, -1)
    return [order[:, sample].flatten() for sample in range(samples)]


def same_places(groups: list[torch.Tensor], key_mask: torch.Tensor | None, layout: TokenLayout) -> list[torch.Tensor]:
    """`groups` of batch entries, int64 on the CPU, cut where entries hide different places of the grid."""
    if key_mask is None or len(key_mask) == len(groups):
        return groups
    shown = (key_mask | (layout.raster_index < 0).to(key_mask.device)).cpu()
    _, kind = shown.unique(dim=0, return_inverse=True)
    return [rows[kind[rows] == one] for rows in groups for one in kind[rows].unique()]


def attention_of_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: list[torch.Tensor],
    plan_of: PlanOf,
    key_mask: torch.Tensor | None,
    **flags: Any,
) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], list[AnyPlan]]:
    """(attention [B, S, H, D], with return_lse also lse [B, S, H]; the plan of each group).

    plan_of: (query, key, key_mask, number of the group) to the group's plan. flags: of `planned_attention`.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    plans: list[AnyPlan] = []
    for number, rows in enumerate(rows.to(query.device) for rows in groups):
        some, mask = (query[rows], key[rows], value[rows]), None if key_mask is None else key_mask[rows]
        plans.append(plan_of(some[0], some[1], mask, number))
        out = planned_attention(*some, plans[-1], key_mask=mask, **flags)
        found.append(out if isinstance(out, tuple) else (out,))
    order = torch.cat(groups).argsort().to(query.device)
    whole = [torch.cat(parts)[order] for parts in zip(*found, strict=True)]
    return (whole[0] if len(whole) == 1 else (whole[0], whole[1])), plans
