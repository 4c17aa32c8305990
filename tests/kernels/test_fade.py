"""The fade's definition against sums written out, and what it must never do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.peers.block_lists import flash_attention_4
from genattn.kernels.plan.block_plan import dense_plan, run_tiles
from genattn.kernels.plan.fade import HIGHEST, LOWEST, Fade, fade_of_tokens, without_outside
from genattn.kernels.plan.first_queries import of_first_queries
from genattn.kernels.plan.random_plan import random_fade, random_plan
from genattn.kernels.plan.tail import TAILS
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.kernels.reference.tail import tail_keys


def inputs_of(plan, heads=2, kv_heads=None, dim=8, batch=1, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads or heads, dim)] * 2
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]


def tiles_of(tiles):
    return {token: row for row, tile in enumerate(tiles.tolist()) for token in tile if token >= 0}


def written_out(query, key, value, plan, fade, key_mask=None):
    """(out, lse) query by query from windows and spans, one logit after the other."""
    scale, group = query.shape[-1] ** -0.5, query.shape[2] // key.shape[2]
    seen = visible_mask(plan)
    pseudo = None if plan.tail is None else tail_keys(key, value, plan.tail, key_mask)
    stood = None if plan.tail is None else plan.tail.stands_in()
    row_of, column_of = tiles_of(plan.query_tiles), tiles_of(plan.key_tiles)
    window, span = fade.window.tolist(), fade.span.tolist()
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], -math.inf)
    for b, q, h in ((b, q, h) for b in range(len(query)) for q in range(plan.seqlen_q) for h in range(query.shape[2])):
        row = row_of[q]
        low, high = window[row]

        def logit(column, vector, low=low, high=high, b=b, q=q, h=h):
            first, last = span[column]
            plain = float(scale * query[b, q, h] @ vector)
            return fade.factor * plain - fade.penalty if last < low or first > high else plain

        terms = []
        for k in seen[h % len(seen), q].nonzero().flatten().tolist():
            if key_mask is None or key_mask[b, k]:
                terms.append((logit(column_of[k], key[b, k, h // group]), value[b, k, h // group]))
        for p in [] if stood is None else stood[h % len(stood), row].nonzero().flatten().tolist():
            weight = float(pseudo.log_count[b, 0, p])
            if weight > -math.inf:
                column = p // plan.tail.parts
                terms.append((logit(column, pseudo.key[b, p, h // group]) + weight, pseudo.value[b, p, h // group]))
        if terms:
            logits = torch.tensor([t for t, _ in terms], dtype=torch.float64)
            lse[b, q, h] = logits.logsumexp(0)
            out[b, q, h] = logits.softmax(0) @ torch.stack([v for _, v in terms])
    return out, lse


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from([None, *TAILS]),
    heads=st.sampled_from([1, 2]),
    scattered=st.booleans(),
    masked=st.booleans(),
    factor=st.sampled_from([0.0, 0.6, 1.0]),
    penalty=st.sampled_from([0.0, 1.5]),
)
def test_reference_is_the_sum_written_out(seed, kind, heads, scattered, masked, factor, penalty):
    plan = random_plan(seed, (2, 2, 3), globals_=3, padding=2, heads=heads, scattered=scattered, keep=0.6, block_q=4, block_k=3)
    fade = random_fade(plan, seed, factor, penalty)
    plan = plan.with_tail(kind).with_fade(fade)
    inputs = inputs_of(plan, batch=2, kv_heads=1, dim=4, seed=seed)
    key_mask = torch.rand(2, plan.seqlen_k, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    got = reference_attention(*inputs, plan, key_mask=key_mask)
    expected = written_out(*inputs, plan, fade, key_mask)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("kind", [None, "mean2"])
def test_gradients_of_the_definition(kind):
    plan = random_plan(5, (1, 3, 4), globals_=2, padding=1, keep=0.5, block_q=4, block_k=4).with_tail(kind)
    plan = plan.with_fade(random_fade(plan, 1))
    inputs = [x.requires_grad_() for x in inputs_of(plan, heads=2, kv_heads=1, dim=3)]
    mask = torch.arange(plan.seqlen_k)[None] % 5 > 0
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference_attention(q, k, v, plan, key_mask=mask)[0], inputs, fast_mode=True
    )
    sums = lambda q, k, v: reference_attention(q, k, v, plan)[1].nan_to_num(0, 0, 0)  # noqa: E731
    assert torch.autograd.gradcheck(sums, inputs, fast_mode=True)


def test_a_tile_is_outside_only_as_a_whole():
    """Two frames of four tokens, then text, in tiles of three: tokens 3..5 straddle, 6..8 hold text."""
    place = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, -2])
    tiles = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, -1], [7, 8, 9], [9, -1, -1]], dtype=torch.int32)
    fade = fade_of_tokens(tiles, tiles, place, torch.tensor([[0, 0], [1, 1]]), 0.5)
    assert fade.window.tolist() == [[0, 0], [0, 1], [1, 1], [LOWEST, HIGHEST], [LOWEST, HIGHEST]]
    assert fade.span.tolist() == fade.window.tolist()
    outside = [(i, j) for i, j in fade.table().nonzero().tolist()]
    assert outside == [(0, 2), (2, 0)], "neither with a tile that straddles, nor with text, nor with padding alone"
    assert fade.outside(torch.tensor([0, 2, 3]), torch.tensor([2, 2, 2])).tolist() == [True, False, False]


def test_padding_in_a_tile_neither_widens_nor_narrows_it():
    place = torch.tensor([2, -2, 2, 5])
    fade = fade_of_tokens(run_tiles(4, 2), run_tiles(4, 2), place, torch.tensor([[9, 9]] * 2 + [[1, 3]] + [[9, 9]] * 3), 0.5)
    assert fade.window.tolist() == [[1, 3], [1, 9]]
    assert fade.span.tolist() == [[2, 2], [2, 5]]


@pytest.mark.parametrize("impl", ["reference", "cpu", "grouped", "sdpa"])
def test_a_plan_with_nothing_outside_is_the_plan_without(impl):
    plan = random_plan(3, keep=0.5).with_tail("mean")
    near = Fade(
        torch.tensor([[0, 4]] * len(plan.query_tiles)).int(), torch.tensor([[2, 3]] * len(plan.key_tiles)).int(), 0.5, 3.0
    )
    assert plan.with_fade(near) is plan
    assert plan.with_fade(random_fade(plan, 0)).with_fade(near).fade is None
    inputs = inputs_of(plan, dtype=torch.float32)
    assert torch.equal(*(block_sparse_attention(*inputs, p, impl=impl) for p in (plan, plan.with_fade(near))))


@pytest.mark.parametrize("impl", ["reference", "cpu", "grouped"])
def test_queries_with_nothing_outside_get_the_same_bits(impl):
    """A window around everything for the first tiles: their rows are those of the plan without a fade."""
    plan = dense_plan(96, 96, 16, 16)
    window = torch.tensor([[0, 5]] * 3 + [[0, 1]] * 3).int()
    span = torch.arange(6).int()[:, None].expand(-1, 2)
    inputs = inputs_of(plan, dtype=torch.float32)
    faded = block_sparse_attention(*inputs, plan.with_fade(Fade(window, span, 0.3, 1.0)), impl=impl, return_lse=True)
    plain = block_sparse_attention(*inputs, plan, impl=impl, return_lse=True)
    bound = 0 if impl != "grouped" else 2e-6  # there queries are served in other groups
    for got, want in zip(faded, plain):
        assert (got[:, :48] - want[:, :48]).abs().max() <= bound
        assert (got[:, 48:] - want[:, 48:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [None, "mean"])
def test_an_infinite_penalty_takes_pairs_out_of_lists_and_tail(kind):
    plan = random_plan(8, (2, 3, 4), keep=0.6, heads=2, block_q=8, block_k=4).with_tail(kind)
    fade = random_fade(plan, 2, 1.0, 0.0)
    inputs = inputs_of(plan)
    far = reference_attention(*inputs, plan.with_fade(replace(fade, penalty=1e4)))
    gone = reference_attention(*inputs, without_outside(plan, fade))
    sees = gone[1] > -math.inf
    assert sees.all() == (kind is not None), "some queries see nothing but what is outside"
    torch.testing.assert_close(gone[0][sees], far[0][sees])
    torch.testing.assert_close(gone[1][sees], far[1][sees])
    assert gone[0][~sees].abs().sum() == 0
    assert not ((far[1] > -5e3) & ~sees).any()


def test_the_first_queries_keep_their_windows():
    plan = random_plan(4, (2, 4, 4), scattered=True, block_q=8, block_k=8).with_tail("mean")
    plan = plan.with_fade(random_fade(plan, 0))
    query, key, value = inputs_of(plan)
    some = reference_attention(query[:, :13], key, value, of_first_queries(plan, 13))
    for got, want in zip(some, reference_attention(query, key, value, plan)):
        torch.testing.assert_close(got, want[:, :13])


def test_bad_fades_are_refused():
    plan = dense_plan(40, 40, 8, 8)
    ends = torch.zeros(5, 2, dtype=torch.int32)
    for factor, penalty in ((-0.1, 0.0), (1.1, 0.0), (0.5, -1.0), (0.5, math.inf), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=r"a factor in \[0, 1\] and a finite penalty >= 0"):
            Fade(ends, ends, factor, penalty)
    with pytest.raises(ValueError, match="the fade must be one for 5 query tiles and 5 key tiles, got 5 windows and 4 spans"):
        replace(plan, fade=Fade(ends, ends[:4], 0.5))


@pytest.mark.parametrize("impl", ["flashinfer", "spargeattn", "triton-full", "triton-int8"])
def test_who_has_no_factor_says_so(impl, monkeypatch):
    plan = dense_plan(64, 64, 16, 16)
    plan = plan.with_fade(random_fade(plan, 0))
    monkeypatch.setattr("genattn.kernels.peers.optional._why_not_package", lambda *_: None)
    monkeypatch.setattr("genattn.kernels.triton.block_sparse.interpreting", lambda: True)
    with pytest.raises(ValueError, match="no factor per tile pair"):
        block_sparse_attention(*inputs_of(plan, dtype=torch.float32), plan, impl=impl)


def test_block_lists_refuse_it():
    plan = dense_plan(64, 64, 16, 16)
    with pytest.raises(ValueError, match="block lists have no factor per tile pair"):
        flash_attention_4(plan.with_fade(random_fade(plan, 0)))
