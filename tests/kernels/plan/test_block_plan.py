"""What a plan says of itself, and what a kernel makes of queries that stand in no tile."""

from dataclasses import replace

import pytest
import torch

from genattn.kernels.cpu.native import native_attention
from genattn.kernels.cpu.native_build import native_library
from genattn.kernels.plan.block_plan import run_tiles
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton.block_sparse import empty_results


@pytest.mark.parametrize("lost", [0, 5])
def test_queries_that_stand_in_no_tile(lost: int) -> None:
    whole = random_plan(3)
    assert whole.covers_queries
    plan = replace(whole, query_tiles=torch.where(whole.query_tiles == lost, -1, whole.query_tiles))
    assert not plan.covers_queries
    query, key, value = (torch.randn(1, n, 2, 16) for n in (plan.seqlen_q, plan.seqlen_k, plan.seqlen_k))
    # a kernel that writes only what stands in a tile must find zeros there, not what was in memory
    out, lse = empty_results(query, plan)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    want, want_lse = reference_attention(query, key, value, plan)
    assert not want[:, lost].any()
    if isinstance(native_library(), str):
        return
    out, lse = native_attention(query, key, value, plan)
    assert not out[:, lost].any()
    assert bool((lse[:, lost] == -torch.inf).all())
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_lists_that_do_not_fit_their_tiles_are_refused() -> None:
    whole = random_plan(3)
    with pytest.raises(
        ValueError, match=rf"row_ptr must be \[N, NQ \+ 1\] and num_full \[N, NQ\] for {len(whole.query_tiles)}"
    ):
        replace(whole, row_ptr=whole.row_ptr[:, :-1])
    with pytest.raises(ValueError, match=f"for {len(whole.query_tiles) - 1} query tiles, got"):
        replace(whole, query_tiles=whole.query_tiles[1:])
    assert int(whole.num_full.sum()) < whole.columns.numel()
    with pytest.raises(ValueError, match="a plan with partial tiles needs an element rule, got rule=None"):
        replace(whole, rule=None)


@pytest.mark.parametrize(("seqlen", "block"), [(0, 4), (4, 0)])
def test_runs_of_nothing_are_refused(seqlen: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"seqlen and block must be >= 1, got {seqlen} and {block}"):
        run_tiles(seqlen, block)
    assert run_tiles(1, 1).tolist() == [[0]]
