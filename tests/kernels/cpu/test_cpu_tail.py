"""The tail on the CPU backends against the definition, over drawn plans."""

import pytest
import torch
from definition_checks import BOUNDS, assert_near_definition, drawn_inputs
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.cpu import grouped as cpu_grouped, groups as cpu_groups
from genattn.kernels.peers import flex
from genattn.kernels.plan.block_plan import run_tiles
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.plan.tail import TAILS, tail_of_plan
from genattn.kernels.reference.attention import reference_attention

IMPLS = ["cpu", "grouped"]


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(TAILS)),
    scattered=st.booleans(),
    heads=st.sampled_from([(2, 2, 1), (4, 2, 1), (4, 2, 4), (3, 1, 3)]),
    dim=st.sampled_from([8, 16, 24, 40, 72]),
    batch=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(BOUNDS)),
    blocks=st.sampled_from([(16, 16), (8, 24), (40, 4)]),
    masked=st.booleans(),
    keep=st.sampled_from([0.0, 0.2, 0.7]),
    cut=st.booleans(),
)
def test_backend_matches_definition(impl, seed, kind, scattered, heads, dim, batch, dtype, blocks, masked, keep, cut):
    heads, kv_heads, lists = heads
    plan = random_plan(
        seed, globals_=4, padding=3, heads=lists, scattered=scattered, block_q=blocks[0], block_k=blocks[1], keep=keep
    ).with_tail(kind, [h % 3 != 1 for h in range(lists)])
    draw = torch.Generator().manual_seed(seed)
    if cut and plan.tail is not None:
        plan = plan.with_tail(plan.tail.only(torch.rand(plan.seqlen_k, generator=draw) < 0.5))
    inputs = drawn_inputs(plan, heads, kv_heads, dim, batch, dtype, seed)
    key_mask = torch.rand(batch, plan.seqlen_k, generator=draw) < 0.6 if masked else None
    got = block_sparse_attention(*inputs, plan, impl=impl, key_mask=key_mask, return_lse=True)
    assert_near_definition(got, inputs, plan, dtype, key_mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TAILS)
def test_large_scores_and_hidden_nans(impl, kind):
    """Masked keys hold NaN, scores lie far apart, and one sample has no key at all."""
    plan = random_plan(3, (4, 6, 6), keep=0.3).with_tail(kind)
    inputs = drawn_inputs(plan, 2, 2, 16, 2, torch.float32, 1)
    inputs[0] *= 4
    key_mask = torch.arange(plan.seqlen_k).expand(2, -1) % 3 > 0
    key_mask = key_mask & torch.tensor([[True], [False]])
    for x in inputs[1:]:
        x.masked_fill_(~key_mask[:, :, None, None], float("nan"))
    got = block_sparse_attention(*inputs, plan, impl=impl, key_mask=key_mask, return_lse=True)
    assert_near_definition(got, inputs, plan, torch.float32, key_mask)
    assert got[0][1].abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(TAILS)),
    heads=st.sampled_from([(4, 2, 1), (4, 2, 4), (2, 2, 2)]),
    masked=st.booleans(),
    scattered=st.booleans(),
    keep=st.sampled_from([0.0, 0.4]),
)
def test_gradients_match_the_definition(impl, seed, kind, heads, masked, scattered, keep):
    heads, kv_heads, lists = heads
    plan = random_plan(
        seed, (2, 4, 5), globals_=3, padding=2, heads=lists, scattered=scattered, block_q=8, block_k=8, keep=keep
    )
    plan = plan.with_tail(kind, [h != 1 for h in range(lists)])
    draw = torch.Generator().manual_seed(seed)
    key_mask = torch.rand(2, plan.seqlen_k, generator=draw) < 0.6 if masked else None
    inputs = drawn_inputs(plan, heads, kv_heads, 8, 2, torch.float32, seed)
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    pull = torch.randn(inputs[0].shape, generator=draw)
    for tensors, name in ((inputs, impl), (exact, "reference")):
        out, lse = block_sparse_attention(*tensors, plan, impl=name, key_mask=key_mask, return_lse=True)
        ((out * pull).sum() + lse[torch.isfinite(lse)].sin().sum()).backward()
    for got, expected in zip(inputs, exact):
        assert not got.grad.isnan().any()
        assert (got.grad.double() - expected.grad).norm() <= 5e-6 * expected.grad.norm().clamp_min(1.0)


def test_grouped_gradients_in_float64(monkeypatch):
    """In pieces of a few queries, against numerical differences."""
    monkeypatch.setattr("genattn.kernels.cpu.backward._SCORES_AT_ONCE", 64)
    plan = random_plan(5, (1, 3, 4), globals_=2, padding=1, keep=0.3, block_q=4, block_k=4).with_tail("mean2")
    inputs = [x.double().requires_grad_() for x in drawn_inputs(plan, 2, 1, 3, 1, torch.float32, 0)]
    mask = torch.arange(plan.seqlen_k)[None] % 5 > 0
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_sparse_attention(q, k, v, plan, key_mask=mask, impl="grouped"), inputs
    )


def test_sdpa_matches_the_definition():
    for lists, masked in ((1, False), (2, True)):
        plan = random_plan(11, heads=lists, padding=2, keep=0.3).with_tail("mean2")
        inputs = [x.requires_grad_() for x in drawn_inputs(plan, 2, 1, 16, 2, torch.float32, 0)]
        key_mask = torch.rand(2, plan.seqlen_k) < 0.6 if masked else None
        if masked:
            key_mask[1] = False
        out = block_sparse_attention(*inputs, plan, impl="sdpa", key_mask=key_mask)
        expected = reference_attention(*inputs, plan, key_mask=key_mask)[0]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        grads, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
        for got, want in zip(grads, wanted):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_sdpa_counts_the_weights_in_its_limit(monkeypatch):
    plan = random_plan(11, keep=0.3).with_tail("mean")
    monkeypatch.setattr("genattn.kernels.peers.sdpa_mask._MASK_BYTES", 2 * plan.seqlen_q * plan.seqlen_k)
    with pytest.raises(ValueError, match="its mask must stay under"):
        block_sparse_attention(*drawn_inputs(plan, 1, 1, 16, 1, torch.float32, 0), plan, impl="sdpa")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("scattered", [False, True])
def test_flex_matches_the_definition(monkeypatch, scattered):
    """Uncompiled, flex computes the same on all pairs."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    plan = random_plan(4, (2, 4, 6), heads=2, scattered=scattered, keep=0.4).with_tail("mean2")
    inputs = drawn_inputs(plan, 2, 1, 16, 2, torch.float32, 0)
    out = block_sparse_attention(*inputs, plan, impl="flex")
    torch.testing.assert_close(out, reference_attention(*inputs, plan)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_heads_side_by_side_stand_in_for_their_own_tiles(monkeypatch, impl, masked):
    """A plan whose tiles belong to one of three sequences each: nobody stands in for another's keys."""
    monkeypatch.setattr(cpu_groups, "_MOST_UNITS", 1)  # so short sequences would be served together
    tiles = run_tiles(3 * 96, 8)
    owner = torch.arange(len(tiles)) // 12
    states = 2 * (torch.rand(1, len(tiles), len(tiles), generator=torch.Generator().manual_seed(0)) < 0.3).int()
    states = states * (owner[:, None] == owner)
    plan = plan_from_states(states, tiles, tiles, None, 3 * 96, 3 * 96)
    plan = plan.with_tail(tail_of_plan(plan, "mean2", among=(owner, owner)))
    inputs = drawn_inputs(plan, 1, 1, 16, 2, torch.float32, 0)
    mask = torch.rand(2, 3 * 96) < 0.7 if masked else None
    whole = block_sparse_attention(*inputs, plan, impl=impl, key_mask=mask, return_lse=True)
    assert_near_definition(whole, inputs, plan, torch.float32, mask)
    for first in range(0, 3 * 96, 96):
        rows, own = slice(first, first + 96), slice(first // 8, first // 8 + 12)
        alone = plan_from_states(states[:, own, own], run_tiles(96, 8), run_tiles(96, 8), None, 96, 96).with_tail("mean2")
        some = [x[:, rows] for x in inputs]
        out = block_sparse_attention(*some, alone, impl="reference", key_mask=None if mask is None else mask[:, rows])
        torch.testing.assert_close(whole[0][:, rows], out, atol=1e-5, rtol=1e-4)
    groups = cpu_groups.groups_with_tail(plan)[0]
    assert any(0 < group.tail <= 24 for group in groups), "each run takes what it sees of 72 pseudo-keys"


@pytest.mark.parametrize("threads", [1, 4, 16])
def test_heads_served_together_stand_in_for_the_same_tiles(monkeypatch, threads):
    """However many heads and samples a machine with many threads takes at once."""
    monkeypatch.setattr(cpu_grouped.torch, "get_num_threads", lambda: threads)
    plan = random_plan(3, globals_=4, padding=3, keep=0.3).with_tail("mean")
    inputs = drawn_inputs(plan, 4, 2, 16, 2, torch.float32, 1)
    assert_near_definition(block_sparse_attention(*inputs, plan, impl="grouped", return_lse=True), inputs, plan, torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_weighs_the_halves_of_each_head_by_its_own_tokens(monkeypatch):
    """Of a plan cut by tokens, the halves of like keys weigh differently in each head and sample."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    plan = random_plan(3, heads=1, keep=0.2, block_q=16, block_k=16).with_tail("mean2")
    plan = plan.with_tail(plan.tail.only(torch.arange(plan.seqlen_k) % 3 == 0))
    inputs = drawn_inputs(plan, 4, 2, 16, 2, torch.float32, 0)
    found = block_sparse_attention(*inputs, plan, impl="flex")
    expected = reference_attention(*(x.double() for x in inputs), plan)[0]
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
