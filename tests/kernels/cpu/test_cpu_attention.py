"""Every CPU backend against the definition, over drawn plans."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.cpu import grouped as cpu_grouped, groups as cpu_groups
from genattn.kernels.operators import block_sparse_forward
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 6e-3}


def _inputs(plan, heads, kv_heads, dim, batch, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads, dim)] * 2
    return [torch.randn(s, generator=draw).to(dtype) for s in shapes]


def _assert_close(got, inputs, plan, dtype, key_mask=None, bound=None):
    out, lse = reference_attention(*(x.double() for x in inputs), plan, key_mask=key_mask)
    assert not got[0].isnan().any()
    error = (got[0].double() - out).norm() / out.norm().clamp_min(1e-30)
    assert error <= (bound or BOUNDS[dtype])
    assert torch.equal(torch.isneginf(got[1]), torch.isneginf(lse))
    finite = torch.isfinite(lse)
    scale = lse[finite].abs().max().clamp_min(10.0) / 10.0
    assert (got[1].double() - lse)[finite].abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * scale


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


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_pieces_of_a_group_make_one_softmax(monkeypatch, threads, kept, dtype):
    monkeypatch.setattr(cpu_grouped, "_KEPT_BIAS_BYTES", kept)
    monkeypatch.setattr(cpu_grouped, "_SCORES_OF_RUN", 1)
    monkeypatch.setattr(cpu_grouped, "_NUMBERS_OF_THREAD", 2000)
    monkeypatch.setattr(cpu_grouped, "_FEWEST_KEYS", 48)
    monkeypatch.setattr(cpu_grouped, "_QUERIES_AT_ONCE", 40)
    monkeypatch.setattr(cpu_grouped, "_FEWEST_QUERIES", 4)
    monkeypatch.setattr(cpu_groups, "_CALL", 0.0)
    monkeypatch.setattr(cpu_groups, "_JOIN", 0)
    monkeypatch.setattr(cpu_grouped.torch, "get_num_threads", lambda: threads)
    plan = RadialPattern().plan(TokenLayout.from_grid((5, 8, 8), text_after=20), 16, 16)
    groups = cpu_groups.groups_of_plan(plan)[0]
    assert any(group.whole and len(group.masks) for group in groups), "nothing hidden beside what all see"
    assert any(group.again for group in groups), "nothing to join"
    assert any(group.keys.shape[1] > 48 and group.queries.shape[1] > 40 for group in groups), "nothing in pieces"
    for heads, batch in ((4, 2), (2, 1), (1, 1)):
        inputs = _inputs(plan, heads, max(1, heads // 2), 16, batch, dtype, 3)
        for _ in range(2):
            got = block_sparse_attention(*inputs, plan, impl="grouped", return_lse=True)
            _assert_close(got, inputs, plan, dtype)
        out = block_sparse_attention(*inputs, plan, impl="grouped")
        torch.testing.assert_close(out, got[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("many", [False, True])
def test_16_bit_products_follow_what_the_machine_multiplies(monkeypatch, many):
    monkeypatch.setattr(cpu_grouped, "_multiplies", lambda dtype: many)
    plan = random_plan(5, globals_=4, padding=3)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = _inputs(plan, 2, 1, 24, 2, dtype, 1)
        _assert_close(block_sparse_attention(*inputs, plan, impl="grouped", return_lse=True), inputs, plan, dtype)


def test_without_onednn_no_16_bit_products(monkeypatch):
    cpu_grouped._multiplies.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_grouped._multiplies(torch.bfloat16)
    monkeypatch.undo()
    cpu_grouped._multiplies.cache_clear()
    assert not cpu_grouped._multiplies(torch.float32), "only 16-bit types"
    assert cpu_grouped._multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("size", [0.0, 60.0, -60.0])
def test_scores_far_apart_and_rows_that_see_nothing(size):
    plan = random_plan(3, globals_=0, padding=5)
    inputs = _inputs(plan, 2, 2, 16, 1, torch.float32, 8)
    inputs[0][..., 0], inputs[1][..., 0] = size, torch.linspace(0.0, 8.0, plan.seqlen_k)[None, :, None]
    got = block_sparse_attention(*inputs, plan, impl="grouped", return_lse=True)
    _assert_close(got, inputs, plan, torch.float32, bound=1e-5)  # scores of 120 are off by 1e-5 in float32
    torch.testing.assert_close(block_sparse_attention(*inputs, plan, impl="grouped"), got[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("impl", ["grouped", "cpu"])
def test_rows_whose_visible_keys_are_all_masked_give_zeros_without_lse_too(seed: int, impl: str):
    plan = random_plan(seed, globals_=0, padding=3)
    inputs = _inputs(plan, 2, 2, 16, 2, torch.float32, 8)
    seen = visible_mask(plan)
    key_mask = torch.rand(2, plan.seqlen_k) < 0.5
    key_mask[0, seen[0, plan.seqlen_q // 2]] = False  # one row, in the middle of a tile, sees nothing any more
    want, lse = reference_attention(*inputs, plan, key_mask=key_mask)
    assert bool((lse == -torch.inf).any())
    with torch.no_grad():
        got = block_sparse_attention(*inputs, plan, impl=impl, key_mask=key_mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", [4, 8])
def test_masked_rows_of_tiles_that_are_served_in_one_go(size: int):
    """Here nothing but the key mask asks for a log-sum-exp."""
    plan = NeighborhoodPattern((3, 3)).plan(TokenLayout.from_grid((size, size)), 16, 16)
    inputs = _inputs(plan, 1, 1, 16, 1, torch.float32, 3)
    key_mask = torch.ones(1, plan.seqlen_k, dtype=torch.bool)
    key_mask[0, visible_mask(plan)[0, size]] = False
    want, lse = reference_attention(*inputs, plan, key_mask=key_mask)
    assert bool(lse[0, size].isneginf().all())
    with torch.no_grad():
        got = block_sparse_attention(*inputs, plan, impl="grouped", key_mask=key_mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_without_lse_there_is_none_and_no_gradient():
    plan = random_plan(2)
    inputs = [x.requires_grad_() for x in _inputs(plan, 2, 2, 16, 1, torch.float32, 8)]
    for impl in ("grouped", "cpu"):
        out, lse = block_sparse_forward(*inputs, None, plan.handle, 0.25, impl, False)
        assert lse.shape == (0,)
        with pytest.raises(RuntimeError, match="with_lse must be True where gradients are wanted"):
            out.sum().backward()
    with torch.no_grad():
        without = block_sparse_attention(*inputs, plan, impl="grouped")
    torch.testing.assert_close(without, block_sparse_attention(*inputs, plan, impl="grouped").detach())


def test_scratch_that_grew_gives_the_same_rows():
    scratch, tensor = cpu_grouped._Scratch(), torch.randn(64, 8)
    lanes = torch.arange(24)
    # the same number of rows in another shape, before and after the memory grew
    for count, length in ((24, 12), (48, 12), (24, 6), (24, 12), (24, 24), (48, 24), (48, 12)):
        lanes = torch.randperm(64)[:count]
        got = scratch.rows("key", (tensor,), lanes, length)
        assert got.shape == (count // length, length, 8)
        assert torch.equal(got.flatten(0, 1), tensor[lanes])
        got = scratch.rows("key", (tensor, -tensor), lanes[: count // 2], length // 2)
        assert torch.equal(got.flatten(0, 1), torch.cat([tensor[lanes[: count // 2]], -tensor[lanes[: count // 2]]]))


def test_the_cheapest_cut_is_found():
    costs = [[3.0, 3.0, 3.0, 3.0], [5.0, 7.0, 4.0], [9.5, 6.0]]
    assert cpu_groups._cheapest(costs) == (9.0, [(0, 1), (1, 4)])
    assert cpu_groups._cheapest([[2.0]]) == (2.0, [(0, 1)])


@pytest.mark.parametrize("seed", range(12))
def test_every_score_is_computed_once(monkeypatch, seed):
    monkeypatch.setattr(cpu_groups, "_CALL", 10.0 * seed)
    monkeypatch.setattr(cpu_groups, "_JOIN", seed % 3)
    radial = RadialPattern().plan(TokenLayout.from_grid((4, 16, 16)), 64, 64)
    plan = radial if seed % 2 else random_plan(seed, globals_=4, padding=3)
    groups = cpu_groups.groups_of_plan(plan)[0]
    count = torch.zeros(plan.seqlen_q, plan.seqlen_k, dtype=torch.int64)
    begun = torch.zeros(plan.seqlen_q, dtype=torch.bool)
    for group in groups:
        masks = [None] * len(group.queries)
        for first, last, place in group.spans(0, len(masks)):
            masks[first:last] = [group.masks[place]] * (last - first)
        for queries, keys, mask in zip(group.queries, group.keys, masks):
            seen = torch.ones(len(queries), len(keys), dtype=torch.int64)
            if mask is not None:
                seen[:, group.whole :] = mask
            count.index_put_((queries[:, None], keys[None]), seen, accumulate=True)
            assert group.again == bool(begun[queries].any()) == bool(begun[queries].all())
            begun[queries] = True
    assert torch.equal(count, visible_mask(plan)[0].long())


def test_the_grouped_path_scales_by_itself() -> None:
    plan = random_plan(3, (1, 2, 4), keep=0.5)
    inputs = _inputs(plan, 2, 2, 24, 1, torch.float32, 5)
    _assert_close(cpu_grouped.grouped_attention(*inputs, plan), inputs, plan, torch.float32)
