"""Every CPU backend against the definition, over drawn plans."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genattn.kernels import cpu_grouped, cpu_groups
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.random_plan import random_plan
from genattn.kernels.reference import reference_attention
from genattn.patterns.radial import RadialPattern
from genattn.token_layout import TokenLayout

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 6e-3}


def _inputs(plan, heads, kv_heads, dim, batch, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads, dim)] * 2
    return [torch.randn(s, generator=draw).to(dtype) for s in shapes]


def _assert_close(got, inputs, plan, dtype, key_mask=None):
    out, lse = reference_attention(*(x.double() for x in inputs), plan, key_mask=key_mask)
    assert not got[0].isnan().any()
    error = (got[0].double() - out).norm() / out.norm().clamp_min(1e-30)
    assert error <= BOUNDS[dtype]
    assert torch.equal(torch.isneginf(got[1]), torch.isneginf(lse))
    finite = torch.isfinite(lse)
    assert (got[1].double() - lse)[finite].abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("impl", ["cpu", "grouped", "reference"])
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    scattered=st.booleans(),
    heads=st.sampled_from([(2, 2, 1), (4, 2, 1), (4, 2, 4), (3, 1, 3)]),
    dim=st.sampled_from([8, 16, 24, 40, 72]),
    batch=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(BOUNDS)),
    blocks=st.sampled_from([(16, 16), (8, 24), (40, 16)]),
    masked=st.booleans(),
)
def test_backend_matches_definition(impl, seed, scattered, heads, dim, batch, dtype, blocks, masked):
    heads, kv_heads, plan_heads = heads
    plan = random_plan(seed, globals_=4, padding=3, heads=plan_heads, scattered=scattered, block_q=blocks[0], block_k=blocks[1])
    inputs = _inputs(plan, heads, kv_heads, dim, batch, dtype, seed)
    key_mask = torch.rand(batch, plan.seqlen_k, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    got = block_sparse_attention(*inputs, plan, impl=impl, key_mask=key_mask, return_lse=True)
    _assert_close(got, inputs, plan, dtype, key_mask)


@pytest.mark.parametrize("impl", ["cpu", "grouped", "sdpa"])
def test_strides_do_not_matter(impl):
    plan = random_plan(7, heads=1)
    query, key, value = _inputs(plan, 2, 2, 16, 1, torch.float32, 0)
    odd = [x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for x in (query, key, value)]
    a = block_sparse_attention(query, key, value, plan, impl=impl)
    torch.testing.assert_close(a, block_sparse_attention(*odd, plan, impl=impl))


def test_sdpa_matches_definition():
    plan = random_plan(11, heads=2, padding=2)
    inputs = _inputs(plan, 2, 1, 16, 2, torch.float32, 0)
    key_mask = torch.rand(2, plan.seqlen_k) < 0.6
    out = block_sparse_attention(*inputs, plan, impl="sdpa", key_mask=key_mask)
    expected = reference_attention(*inputs, plan, key_mask=key_mask)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("few", [1, 10_000])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_parts_of_a_group_make_one_softmax(monkeypatch, few, kept):
    monkeypatch.setattr(cpu_grouped, "_FEW_KEYS", few)
    monkeypatch.setattr(cpu_grouped, "_KEPT_BIAS_BYTES", kept)
    monkeypatch.setattr(cpu_grouped, "_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(cpu_grouped, "_KEYS_AT_ONCE", 24)
    monkeypatch.setattr(cpu_groups, "_CALL", 0.0)
    plan = RadialPattern().plan(TokenLayout.from_grid((5, 8, 8), text_after=20), 16, 16)
    inputs = _inputs(plan, 4, 2, 16, 2, torch.float32, 3)
    rates = cpu_groups.CallRates.of(inputs[0], plan)
    groups = [group for groups in cpu_groups.groups_of_plan(plan, rates) for group in groups]
    assert any(group.whole and group.mask is not None for group in groups), "nothing to join"
    for _ in range(2):
        got = block_sparse_attention(*inputs, plan, impl="grouped", return_lse=True)
        _assert_close(got, inputs, plan, torch.float32)


def test_what_a_dense_call_costs():
    rows = torch.tensor([128, 256, 768, 1024])
    for half in (False, True):
        for wide in (False, True):
            plain, masked = cpu_groups.CallRates(half, wide, 1, 1).factors(rows)
            assert bool((plain.diff() <= 0).all())
            assert bool((plain[:2] >= 1.0).all())
            assert bool((masked > 0.9).all())
    one = cpu_groups.CallRates(False, False, 1, 1).factors(rows)[0]
    two = cpu_groups.CallRates(False, False, 1, 2).factors(rows)[0]
    assert float(two[2] / one[2]) == pytest.approx(4 / 3), "three slices of 256 keep two threads busy for as long as four"
    assert float(two[3] / one[3]) == pytest.approx(1.0)
    many = cpu_groups.CallRates(False, False, 16, 2).factors(rows)[0]
    assert float(many[2]) == pytest.approx(1.0), "heads fill the threads"
    query = torch.zeros(2, 8, 3, 80, dtype=torch.bfloat16)
    assert cpu_groups.CallRates.of(query, random_plan(0)) == cpu_groups.CallRates(True, True, 6, torch.get_num_threads())


def test_every_query_stands_in_one_group_and_neighbours_share_calls():
    layout, pattern = TokenLayout.from_grid((4, 16, 16)), RadialPattern()
    plan = pattern.plan(layout, 64, 64)
    groups = cpu_groups.groups_of_plan(plan, cpu_groups.CallRates(False, False, 1, 2))[0]
    queries = torch.cat([group.queries.flatten() for group in groups])
    assert torch.equal(queries.sort().values, torch.arange(layout.seqlen))
    assert max(group.queries.shape[1] for group in groups) > 64
    for group in groups:
        for place, (run, keys) in enumerate(zip(group.queries, group.keys)):
            want = pattern.mask(layout)[run][:, keys]
            assert want[:, : group.whole].all()
            assert torch.equal(want[:, group.whole :], want[:, :0] if group.mask is None else group.mask[place])
            assert want.sum() == pattern.mask(layout)[run].sum(), "a key is missing"
