"""A plan for some of its queries: the first tokens of the sequence ask, all of it answers.

Where processes share a sequence, each keeps its own tokens in front; so the key tiles, the rule and the tail stay as they are.
"""

from dataclasses import replace

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting


def of_first_queries(plan: BlockPlan, count: int) -> BlockPlan:
    """The plan with seqlen_q = count, kept in the plan: lanes of later tokens are unused, and query tiles without a lane gone.

    Raises ValueError unless 1 <= count <= plan.seqlen_q.
    """
    if not 1 <= count <= plan.seqlen_q:
        raise ValueError(f"count must lie in [1, {plan.seqlen_q}], got {count}")
    if count == plan.seqlen_q:
        return plan
    key = ("first queries", count)
    if key not in plan.cache:
        plan.cache[key] = _cut(plan, count)
    return plan.cache[key]  # type: ignore[return-value]


@lasting
def _cut(plan: BlockPlan, count: int) -> BlockPlan:
    lanes = torch.where(plan.query_tiles < count, plan.query_tiles, -1)
    kept = (lanes >= 0).any(1)
    row, _ = plan.entries
    columns = plan.columns[kept.repeat(plan.num_heads)[row]]
    lengths = plan.row_lengths[:, kept]
    ends = lengths.flatten().cumsum(0).view(lengths.shape)
    row_ptr = torch.cat([ends[:, :1] - lengths[:, :1], ends], 1).to(torch.int32)
    tail = plan.tail if plan.tail is None else replace(plan.tail, skipped=plan.tail.skipped[:, kept])
    fade = plan.fade if plan.fade is None else replace(plan.fade, window=plan.fade.window[kept])
    num_full = plan.num_full[:, kept]
    rule = None if int(num_full.sum()) == columns.numel() else plan.rule
    # a tail asks the rule which tokens are padding
    rule = plan.rule if tail is not None else rule
    return BlockPlan(lanes[kept], plan.key_tiles, row_ptr, columns, num_full, rule, count, plan.seqlen_k, tail, fade)
