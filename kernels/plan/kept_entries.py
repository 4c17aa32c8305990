"""A plan with some of the entries of its lists."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from genattn.kernels.plan.block_plan import BlockPlan


def keep_entries(plan: "BlockPlan", stay: torch.Tensor) -> "BlockPlan":
    """The plan with the entries of `columns` that `stay`, bool [nnz], names; everything else as it is."""
    heads, rows = plan.num_full.shape
    row, partial = plan.entries
    lengths = torch.bincount(row[stay], minlength=heads * rows)
    num_full = torch.bincount(row[stay & ~partial], minlength=heads * rows).view(heads, rows).to(torch.int32)
    ends = lengths.cumsum(0).view(heads, rows)
    ptr = torch.cat([(ends - lengths.view(heads, rows))[:, :1], ends], 1).to(torch.int32)
    return replace(plan, row_ptr=ptr, columns=plan.columns[stay], num_full=num_full)
