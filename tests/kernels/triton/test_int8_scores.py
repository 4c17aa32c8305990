"""int8 scores by their definition: how far from exact, what smoothing is worth, and who is refused."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import IMPLS, block_sparse_attention, choose_impl
from genattn.kernels.plan.block_plan import dense_plan, run_tiles
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton import int8_scores
from genattn.kernels.triton.int8_scores import dequantised, int8_reference_attention, quantised, smoothed_mean


def _inputs(plan, dim=64, shift=0.0):
    query, key, value = (torch.randn(1, plan.seqlen_q, 2, dim) for _ in range(3))
    return query, key + shift * torch.randn(dim), value


def _error(got, want):
    return float((got - want).norm() / want.norm())


@given(st.integers(0, 50), st.sampled_from([16, 64, 128]), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_row_is_kept_within_half_a_step_of_its_tile(seed, block, size):
    torch.manual_seed(seed)
    rows, tiles = torch.randn(2, 100, 3, 8) * size, run_tiles(100, block)
    whole, scales = quantised(rows, tiles)
    assert whole.dtype == torch.int8
    assert scales.shape == (2, 3, len(tiles))
    steps = scales.transpose(1, 2)[:, torch.arange(100) // block][..., None]
    assert bool(((dequantised(whole, scales, tiles) - rows).abs() <= 0.5001 * steps).all())
    assert int(whole.abs().max()) == 127


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_error_on_random_data(dim):
    plan = random_plan(1, (4, 6, 6))
    inputs = _inputs(plan, dim)
    want, want_lse = reference_attention(*(x.double() for x in inputs), plan)
    got, lse = int8_reference_attention(*inputs, plan)
    assert 1e-4 < _error(got, want) < 2.5e-2
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert float((lse - want_lse)[finite].abs().max()) < 5e-2


def test_smoothing_takes_away_what_all_keys_share(monkeypatch):
    plan = dense_plan(256, 256, 64, 64)
    inputs = _inputs(plan, shift=10.0)
    want = reference_attention(*(x.double() for x in inputs), plan)[0]
    smoothed = _error(int8_reference_attention(*inputs, plan)[0], want)
    monkeypatch.setattr(int8_scores, "smoothed_mean", lambda key, plan, mask: torch.zeros_like(key[:, 0]))
    raw = _error(int8_reference_attention(*inputs, plan)[0], want)
    assert smoothed < 2.5e-2
    assert raw > 4 * smoothed


def test_hidden_and_unlisted_keys_count_for_nothing():
    plan = random_plan(2, (2, 3, 4), padding=3)
    query, key, value = _inputs(plan)
    seen = torch.rand(1, plan.seqlen_k) < 0.6
    clean = int8_reference_attention(query, key, value, plan, key_mask=seen)
    key[~seen] = float("nan")
    for one, other in zip(clean, int8_reference_attention(query, key, value, plan, key_mask=seen)):
        assert torch.equal(one, other)
    assert bool(smoothed_mean(key, plan, seen).isfinite().all())


def test_nobody_takes_it_unless_named():
    plan = random_plan(0)
    query = torch.randn(1, plan.seqlen_q, 1, 32, dtype=torch.bfloat16)
    assert "triton-int8" in IMPLS
    chosen, reasons = choose_impl(query, query, query, plan)
    assert chosen != "triton-int8"
    assert "triton-int8" not in reasons
    with pytest.raises(ValueError, match="needs a GPU|triton is not installed"):
        block_sparse_attention(query, query, query, plan, impl="triton-int8")
