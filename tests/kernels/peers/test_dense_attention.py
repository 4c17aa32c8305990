"""Dense backends by capability, and flex_attention from the same plan."""

import pytest
import torch
import torch.nn.functional as F

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.peers import flex
from genattn.kernels.peers.dense import dense_attention_with_lse, dense_backends, missing_peers
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention, tile_states
from genattn.patterns.neighborhood import NeighborhoodPattern


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
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own, on loading inductor
@pytest.mark.parametrize("scattered", [False, True])
def test_flex_matches_the_definition(scattered):
    plan = random_plan(1, (3, 8, 8), block_q=128, block_k=128, scattered=scattered)
    inputs = [torch.randn(1, plan.seqlen_q, 2, 32) for _ in range(3)]
    out = block_sparse_attention(*inputs, plan, impl="flex")
    torch.testing.assert_close(out, reference_attention(*inputs, plan)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("rule", [False, True])
def test_flex_takes_tiles_that_are_no_runs(monkeypatch, rule):
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    pattern = NeighborhoodPattern((2, 4, 4), stride=1 if rule else (2, 4, 4))
    plan = pattern.plan(TokenLayout.from_grid((4, 8, 8 if rule else 4), text_after=5), 32, 32)
    assert (plan.query_tiles < 0).any(), "no unused query lane"
    assert (plan.key_tiles < 0).any(), "no unused key lane"
    assert bool((tile_states(plan) == 1).any()) or not rule
    inputs = [torch.randn(2, plan.seqlen_q, heads, 16) for heads in (2, 1, 1)]
    want = reference_attention(*inputs, plan)[0]
    for _ in range(2):
        torch.testing.assert_close(block_sparse_attention(*inputs, plan, impl="flex"), want, atol=1e-5, rtol=1e-4)


def test_flex_says_why_not():
    plan = random_plan(1)
    inputs = [torch.randn(1, plan.seqlen_q, 1, 16) for _ in range(3)]
    mask = torch.ones(1, plan.seqlen_k, dtype=torch.bool)
    for options, reason in (({"key_mask": mask}, "key mask"), ({"return_lse": True}, "no log-sum-exp")):
        with pytest.raises(ValueError, match=reason):
            block_sparse_attention(*inputs, plan, impl="flex", **options)
    with pytest.raises(ValueError, match="no backward"):
        block_sparse_attention(inputs[0].requires_grad_(), *inputs[1:], plan, impl="flex")
