"""Dense backends by capability, and flex_attention from the same plan."""

import pytest
import torch
import torch.nn.functional as F

from genattn.kernels.block_plan import dense_plan
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.dense import dense_attention_with_lse, dense_backends, missing_peers
from genattn.kernels.random_plan import random_plan
from genattn.kernels.reference import reference_attention


def test_every_dense_backend_agrees_or_says_why_not():
    query, key, value = (torch.randn(1, 40, 2, 16) for _ in range(3))
    calls, reasons = dense_backends(query)
    assert {"sdpa", "sdpa:math"} <= set(calls)
    assert all(reasons.values())
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    for call in calls.values():
        torch.testing.assert_close(call(query, key, value), expected)
    assert all("pip install" in how for how in missing_peers().values())


def test_dense_lse_matches_the_definition():
    query, key, value = torch.randn(2, 33, 4, 16), torch.randn(2, 33, 2, 16), torch.randn(2, 33, 2, 16)
    out, lse = dense_attention_with_lse(query, key, value)
    want, want_lse = reference_attention(query, key, value, dense_plan(33, 33))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_lse_needs_a_device_that_has_it():
    tensor = torch.empty(1, 8, 1, 16, device="meta")
    with pytest.raises(ValueError, match="must run on cpu or cuda"):
        dense_attention_with_lse(tensor, tensor, tensor)


@pytest.mark.slow
def test_flex_matches_the_definition():
    plan = random_plan(1, (3, 8, 8), block_q=128, block_k=128)
    inputs = [torch.randn(1, plan.seqlen_q, 2, 32) for _ in range(3)]
    out = block_sparse_attention(*inputs, plan, impl="flex")
    torch.testing.assert_close(out, reference_attention(*inputs, plan)[0], atol=1e-5, rtol=1e-4)


def test_flex_says_why_not():
    plan = random_plan(1, scattered=True)
    inputs = [torch.randn(1, plan.seqlen_q, 1, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="runs of the sequence"):
        block_sparse_attention(*inputs, plan, impl="flex")
    plan = random_plan(1)
    mask = torch.ones(1, plan.seqlen_k, dtype=torch.bool)
    for options, reason in (({"key_mask": mask}, "key mask"), ({"return_lse": True}, "no log-sum-exp")):
        with pytest.raises(ValueError, match=reason):
            block_sparse_attention(*inputs, plan, impl="flex", **options)
    with pytest.raises(ValueError, match="no backward"):
        block_sparse_attention(inputs[0].requires_grad_(), *inputs[1:], plan, impl="flex")
