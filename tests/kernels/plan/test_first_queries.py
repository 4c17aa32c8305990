"""A plan for the first of its queries: the rows of the whole answer, by every backend, forward and backward."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.first_queries import of_first_queries
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention, visible_mask


def drawn(plan, heads, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    lengths = plan.seqlen_q, plan.seqlen_k, plan.seqlen_k
    return [torch.randn(1, length, heads, 8, generator=draw, dtype=dtype, requires_grad=True) for length in lengths]


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 2]), st.sampled_from([None, "mean", "mean2"]), st.floats(0, 1)
)
def test_rows_of_the_whole(seed, scattered, heads, tail, share):
    plan = random_plan(seed, scattered=scattered, heads=heads).with_tail(tail)
    count = 1 + int(share * (plan.seqlen_q - 1))
    cut = of_first_queries(plan, count)
    assert (cut.seqlen_q, cut.seqlen_k) == (count, plan.seqlen_k)
    assert torch.equal(visible_mask(cut), visible_mask(plan)[:, :count])
    assert cut.columns.numel() <= plan.columns.numel()
    query, key, value = drawn(plan, 2)
    wanted, lse = reference_attention(query, key, value, plan)
    found, found_lse = reference_attention(query[:, :count], key, value, cut)
    torch.testing.assert_close(found, wanted[:, :count])
    torch.testing.assert_close(found_lse, lse[:, :count])
    assert of_first_queries(plan, count) is cut


@pytest.mark.parametrize("impl", ["cpu", "grouped", "sdpa"])
@pytest.mark.parametrize("tail", [None, "mean"])
def test_every_backend_takes_it(impl, tail):
    plan = of_first_queries(random_plan(3, keep=0.5).with_tail(tail), 53)
    query, key, value = drawn(plan, 2, torch.float32)
    slope = torch.randn(query.shape)
    wanted = torch.autograd.grad(reference_attention(query, key, value, plan)[0], (query, key, value), slope)
    out = block_sparse_attention(query, key, value, plan, impl=impl)
    torch.testing.assert_close(out, reference_attention(query, key, value, plan)[0], atol=1e-5, rtol=1e-5)
    for found, want in zip(torch.autograd.grad(out, (query, key, value), slope), wanted):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_all_of_them_is_the_plan_itself_and_none_is_refused():
    plan = dense_plan(37, 37, 16, 16)
    assert of_first_queries(plan, 37) is plan
    for count in (0, 38):
        with pytest.raises(ValueError, match=f"count must lie in \\[1, 37\\], got {count}"):
            of_first_queries(plan, count)
