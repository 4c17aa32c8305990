"""Shared by the pattern tests: a plan held against the element rule, tile pair by tile pair."""

import torch

from genattn.kernels.plan.block_plan import BlockPlan


def plan_codes(plan: BlockPlan) -> torch.Tensor:
    """Uint8 [N, NQ, NK]: 0 not listed, 1 partial, 2 full."""
    codes = torch.zeros(plan.num_heads, plan.query_tiles.shape[0], plan.key_tiles.shape[0], dtype=torch.uint8)
    for head in range(plan.num_heads):
        for tile in range(plan.query_tiles.shape[0]):
            first, last = int(plan.row_ptr[head, tile]), int(plan.row_ptr[head, tile + 1])
            columns, full = plan.columns[first:last].long(), int(plan.num_full[head, tile])
            assert columns.unique().numel() == columns.numel(), "a key tile is listed twice"
            codes[head, tile, columns[full:]] = 1
            codes[head, tile, columns[:full]] = 2
    return codes


def mask_codes(mask: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """The same from a mask [S, S] or [H, S, S], by looking at every element."""
    mask = mask if mask.ndim == 3 else mask[None]
    query, key = plan.query_tiles.long(), plan.key_tiles.long()
    seen = mask[:, query.flatten().clamp_min(0)][:, :, key.flatten().clamp_min(0)]
    used = (query.flatten() >= 0)[:, None] & (key.flatten() >= 0)[None]
    shape = (-1, len(query), plan.block_q, len(key), plan.block_k)
    some, every = (seen & used).view(shape), (seen | ~used).view(shape)
    return some.any(4).any(2).to(torch.uint8) + every.all(4).all(2).to(torch.uint8)


def assert_tiles_cover(plan: BlockPlan, padding: torch.Tensor) -> None:
    """Every token stands in one query tile, every token that is not padding in one key tile."""
    query, key = plan.query_tiles[plan.query_tiles >= 0].long(), plan.key_tiles[plan.key_tiles >= 0].long()
    assert torch.equal(query.sort().values, torch.arange(plan.seqlen_q))
    keys = key[~padding[key]]
    assert torch.equal(keys.sort().values, torch.arange(plan.seqlen_k)[~padding])


def assert_plan_is_exact(plan: BlockPlan, mask: torch.Tensor, padding: torch.Tensor) -> None:
    """Listed iff the mask has any pair in it, full iff it has all."""
    assert_tiles_cover(plan, padding)
    expected, got = mask_codes(mask, plan), plan_codes(plan)
    assert torch.equal(got, expected), f"{(got != expected).sum()} of {expected.numel()} tile pairs differ"
