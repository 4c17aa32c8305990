"""A batch whose samples have a plan each: what a pattern chooses by content is then no matter of what else is in the batch."""

from collections.abc import Callable
from typing import Any

import torch

from genattn.functional.dispatch import AnyPlan, planned_attention

PlanOf = Callable[[torch.Tensor, torch.Tensor, int], AnyPlan]


def rows_of_samples(batch: int, samples: int | None, passes: int | None = None) -> list[torch.Tensor]:
    """The entries of each sample in a batch of sequences, int64; each entry alone where the samples are not known.

    Entries are ordered by guidance pass, then sample, then what is folded into the batch (frames of a spatial attention).
    passes: in this batch; None: nothing is folded in.
    """
    if samples is None or batch % (samples * (passes or 1)):
        return list(torch.arange(batch).split(1))
    order = torch.arange(batch).view(passes or batch // samples, samples, -1)
    return [order[:, sample].flatten() for sample in range(samples)]


def attention_of_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: list[torch.Tensor],
    plan_of: PlanOf,
    key_mask: torch.Tensor | None,
    **flags: Any,
) -> tuple[torch.Tensor, list[AnyPlan]]:
    """(attention [B, S, H, D], the plan of each group). plan_of: (query, key, number of the group) to the group's plan."""
    found: list[torch.Tensor] = []
    plans: list[AnyPlan] = []
    for number, rows in enumerate(rows.to(query.device) for rows in groups):
        some = query[rows], key[rows], value[rows]
        plans.append(plan_of(some[0], some[1], number))
        out = planned_attention(*some, plans[-1], key_mask=None if key_mask is None else key_mask[rows], **flags)
        assert isinstance(out, torch.Tensor)
        found.append(out)
    order = torch.cat(groups).argsort().to(query.device)
    return torch.cat(found)[order], plans
