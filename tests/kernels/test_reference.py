"""The definition against a mask softmax written out, and its corner cases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention, choose_impl
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.reference.attention import reference_attention, visible_mask


def _inputs(plan, heads=2, kv_heads=None, dim=8, batch=1, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads or heads, dim)] * 2
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 2]))
def test_reference_is_masked_softmax(seed, scattered, heads):
    plan = random_plan(seed, (2, 4, 5), globals_=3, padding=2, heads=heads, scattered=scattered)
    query, key, value = _inputs(plan)
    mask = visible_mask(plan)
    out, lse = reference_attention(query, key, value, plan)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.exp() * mask
    total = weights.sum(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights / total.clamp_min(1e-300)[..., None], value)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, total.log().transpose(1, 2))


def test_full_plan_is_sdpa():
    plan = dense_plan(37, 50, 16, 16)
    query, key, value = _inputs(plan, heads=4, kv_heads=2)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), enable_gqa=True)
    torch.testing.assert_close(reference_attention(query, key, value, plan)[0], expected.transpose(1, 2))


def test_chunks_of_rows_do_not_matter(monkeypatch):
    plan = random_plan(3, scattered=True)
    inputs = _inputs(plan)
    whole = reference_attention(*inputs, plan)
    monkeypatch.setattr("genattn.kernels.reference.attention._SCORES_AT_ONCE", 2 * plan.seqlen_k * 5)
    for a, b in zip(whole, reference_attention(*inputs, plan)):
        torch.testing.assert_close(a, b)


def test_query_that_sees_nothing_gets_zero_and_finite_gradients():
    states = torch.tensor([[[0, 0], [2, 0]]])
    tiles = dense_plan(8, 8, 4, 4).query_tiles
    plan = plan_from_states(states, tiles, tiles, None, 8, 8)
    inputs = [x.requires_grad_() for x in _inputs(plan)]
    out, lse = reference_attention(*inputs, plan)
    assert out[:, :4].abs().max() == 0
    assert torch.isneginf(lse[:, :4]).all()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_hidden_keys_may_hold_nan():
    plan = random_plan(5)
    query, key, value = _inputs(plan)
    key_mask = torch.ones(1, plan.seqlen_k, dtype=torch.bool)
    key_mask[:, 3:11] = False
    clean = reference_attention(query, key, value, plan, key_mask=key_mask)
    key[:, 3:11], value[:, 3:11] = float("nan"), float("inf")
    for a, b in zip(clean, reference_attention(query, key, value, plan, key_mask=key_mask)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query must be"),
        (lambda q, k, v: (q, k, v[:, :-1]), "query must be"),
        (lambda q, k, v: (q[..., :4], k, v), "agree in batch"),
        (lambda q, k, v: (q[:, :-1], k, v), "the plan is for"),
        (lambda q, k, v: (q.float(), k, v), "one floating type"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "one floating type"),
    ],
)
def test_wrong_shapes_are_told(change, message):
    plan = random_plan(0)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*change(*_inputs(plan)), plan)


def test_wrong_heads_mask_and_impl_are_told():
    plan = random_plan(0, heads=3)
    inputs = _inputs(plan)
    with pytest.raises(ValueError, match="for 3 heads"):
        block_sparse_attention(*inputs, plan)
    plan = random_plan(0)
    with pytest.raises(ValueError, match="key_mask must be bool"):
        block_sparse_attention(*inputs, plan, key_mask=torch.ones(1, plan.seqlen_k))
    with pytest.raises(ValueError, match="impl must be one of"):
        choose_impl(*inputs, plan, impl="cuda")
    with pytest.raises(ValueError, match="returns no log-sum-exp"):
        block_sparse_attention(*inputs, plan, impl="sdpa", return_lse=True)
