"""The tail's definition against sums written out, and what it must never do."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, dense_plan, run_tiles
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.plan.tail import TAILS, tail_of_plan, unpack_words
from genattn.kernels.reference.attention import reference_attention, tile_states, visible_mask
from genattn.kernels.reference.tail import tail_keys


def inputs_of(plan, heads=2, kv_heads=None, dim=8, batch=1, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads or heads, dim)] * 2
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]


def alike(keys, rows, parts):
    """The rows in `parts` runs along the direction in which their keys differ most, written out."""
    if not rows or parts == 1:
        return [rows]
    away = keys[rows] - keys[rows].mean(0)
    direction = max(away, key=lambda x: float(x.norm()))
    direction = sum(float(x @ direction) * x for x in away)
    direction = direction / direction.norm().clamp_min(1e-20)
    places = [float(x @ direction) for x in away]
    order = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (places[i], i))]
    cuts = [math.ceil(part * len(rows) / parts) for part in range(parts + 1)]
    return [order[first:last] for first, last in itertools.pairwise(cuts)]


def written_out(query, key, value, plan, kind, key_mask=None):
    """(out, lse) by loops over tiles and parts, one head and sample at a time, from the lists alone."""
    scale, parts = query.shape[-1] ** -0.5, TAILS[kind]
    group = query.shape[2] // key.shape[2]
    visible, states = visible_mask(plan), tile_states(plan)
    padding = set() if plan.rule is None else set((plan.rule.coords[:, 0] == -2).nonzero().flatten().tolist())
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], -math.inf)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            keys, values = key[b, :, h // group], value[b, :, h // group]
            seen = visible[h % len(visible)] & (True if key_mask is None else key_mask[b])
            for i, tile in enumerate(plan.query_tiles.tolist()):
                extra = []
                for j, key_tile in enumerate(plan.key_tiles.tolist()):
                    if states[h % len(states), i, j]:
                        continue
                    rows = [t for t in key_tile if t >= 0 and t not in padding]
                    rows = [t for t in rows if key_mask is None or key_mask[b, t]]
                    extra += [part for part in alike(keys, rows, parts) if part]
                for q in [t for t in tile if t >= 0]:
                    vector = query[b, q, h]
                    terms = [(scale * vector @ keys[k], values[k]) for k in seen[q].nonzero().flatten()]
                    for rows in extra:
                        score = scale * vector @ keys[rows].mean(0) + math.log(len(rows))
                        terms.append((score, values[rows].mean(0)))
                    if terms:
                        scores = torch.stack([s for s, _ in terms])
                        lse[b, q, h] = scores.logsumexp(0)
                        out[b, q, h] = scores.softmax(0) @ torch.stack([v for _, v in terms])
    return out, lse


@pytest.mark.parametrize("kind", TAILS)
@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 2]), st.booleans())
def test_reference_is_the_sum_written_out(kind, seed, scattered, heads, masked):
    plan = random_plan(
        seed, (2, 3, 4), globals_=3, padding=2, heads=heads, scattered=scattered, keep=0.4, block_q=8, block_k=6
    ).with_tail(kind)
    query, key, value = inputs_of(plan, batch=2, kv_heads=1, seed=seed)
    key_mask = torch.rand(2, plan.seqlen_k, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    out, lse = reference_attention(query, key, value, plan, key_mask=key_mask)
    expected = written_out(query, key, value, plan, kind, key_mask)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("kind", TAILS)
def test_keys_equal_within_a_tile_give_dense_attention(kind):
    plan = skipping_plan(70, 16).with_tail(kind)
    query, key, value = inputs_of(plan)
    owner = torch.arange(70) // 16 * 16
    key, value = key[:, owner], value[:, owner]
    out, lse = reference_attention(query, key, value, plan)
    dense = reference_attention(query, key, value, dense_plan(70, 70, 16, 16))
    torch.testing.assert_close(out, dense[0])
    torch.testing.assert_close(lse, dense[1])


def skipping_plan(seqlen: int, block: int, seed: int = 0, heads: int = 1) -> BlockPlan:
    tiles = run_tiles(seqlen, block)
    states = 2 * (torch.rand(heads, len(tiles), len(tiles), generator=torch.Generator().manual_seed(seed)) < 0.4).int()
    return plan_from_states(states, tiles, tiles, None, seqlen, seqlen)


def test_a_plan_that_skips_nothing_has_no_tail():
    plan = dense_plan(40, 40, 16, 16)
    assert plan.with_tail("mean") is plan
    assert plan.tail is None


def test_with_tail_none_takes_it_away():
    plan = skipping_plan(40, 8).with_tail("mean")
    assert plan.tail is not None
    assert plan.with_tail(None).tail is None


def test_tiles_of_padding_alone_are_not_skipped_tiles():
    plan = random_plan(0, (2, 4, 4), globals_=0, padding=16, keep=1.0, block_q=16, block_k=16)
    tail = plan.with_tail("mean").tail
    assert tail is not None
    assert not tail.stands_in()[..., -1].any(), "the last key tile is padding"
    assert (tail.tokens[-1] < 0).all()


def test_a_hidden_key_holds_anything():
    plan = skipping_plan(40, 8).with_tail("mean2")
    query, key, value = inputs_of(plan)
    key_mask = torch.arange(40)[None] % 3 > 0
    clean = reference_attention(query, key, value, plan, key_mask=key_mask)
    key, value = (x.masked_fill(~key_mask[:, :, None, None], math.nan) for x in (key, value))
    for got, expected in zip(reference_attention(query, key, value, plan, key_mask=key_mask), clean):
        torch.testing.assert_close(got, expected)


def test_all_keys_hidden_gives_zeros_and_minus_infinity():
    plan = skipping_plan(40, 8).with_tail("mean")
    out, lse = reference_attention(*inputs_of(plan), plan, key_mask=torch.zeros(1, 40, dtype=torch.bool))
    assert out.abs().max() == 0
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("kind", TAILS)
def test_gradients_of_the_definition(kind):
    plan = random_plan(5, (1, 3, 4), globals_=2, padding=1, keep=0.3, block_q=4, block_k=4).with_tail(kind)
    inputs = [x.requires_grad_() for x in inputs_of(plan, heads=2, kv_heads=1, dim=3)]
    mask = torch.arange(plan.seqlen_k)[None] % 5 > 0
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, plan, key_mask=mask)[0], inputs)
    torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, plan)[1].nan_to_num(0, 0, 0), inputs)


def test_heads_without_a_tail_see_their_tiles_only():
    plan = skipping_plan(48, 8, heads=2)
    mixed = plan.with_tail("mean", heads=(True, False))
    inputs = inputs_of(plan)
    got, lse = reference_attention(*inputs, mixed)
    for head, whole in enumerate((plan.with_tail("mean"), plan)):
        out, sums = reference_attention(*inputs, whole)
        assert torch.equal(got[:, :, head], out[:, :, head])
        assert torch.equal(lse[:, :, head], sums[:, :, head])


def test_pieces_by_token_share_out_the_weight():
    """The pseudo-keys of a plan cut in two by tokens weigh together what they weighed before."""
    plan = skipping_plan(48, 8).with_tail("mean")
    _, key, value = inputs_of(plan)
    first = torch.arange(48) % 3 == 0
    whole = tail_keys(key, value, plan.tail)
    halves = [tail_keys(key, value, plan.tail.only(keys)) for keys in (first, ~first)]
    torch.testing.assert_close(sum(h.log_count.exp() for h in halves), whole.log_count.exp())
    for half in halves:
        assert torch.equal(half.key, whole.key)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.integers(0, 1000))
def test_words_hold_the_skipped_tiles(tiles, seed):
    rows = torch.full((2, 1), 0, dtype=torch.int32) + torch.arange(2, dtype=torch.int32)[:, None]
    keys = torch.arange(tiles, dtype=torch.int32)[:, None]
    states = 2 * (torch.rand(1, 2, tiles, generator=torch.Generator().manual_seed(seed)) < 0.5).int()
    plan = plan_from_states(states, rows, keys, None, 2, tiles)
    tail = plan.with_tail("mean").tail
    expected = states == 0
    if tail is None:
        assert not expected.any()
    else:
        assert torch.equal(unpack_words(tail.skipped, tiles), expected)


def test_bad_tails_are_refused():
    plan = skipping_plan(40, 8, heads=2)
    with pytest.raises(ValueError, match="tail must be None or one of mean, mean2, got 'median'"):
        plan.with_tail("median")
    with pytest.raises(ValueError, match="one entry for each of the plan's 2 lists, got 1"):
        tail_of_plan(plan, "mean", heads=(True,))
    other = skipping_plan(80, 8, heads=2).with_tail("mean").tail
    with pytest.raises(ValueError, match=r"the tail must be one for these lists, with skipped \[2, 5, 1\]"):
        BlockPlan(plan.query_tiles, plan.key_tiles, plan.row_ptr, plan.columns, plan.num_full, None, 40, 40, other)


@pytest.mark.parametrize("impl", ["flashinfer", "triton-full", "triton-int8"])
def test_who_has_no_tail_says_so(impl, monkeypatch):
    plan = skipping_plan(64, 16).with_tail("mean")
    monkeypatch.setattr("genattn.kernels.peers.optional._why_not_package", lambda *_: None)
    monkeypatch.setattr("genattn.kernels.triton.block_sparse.interpreting", lambda: True)
    with pytest.raises(ValueError, match="tail='mean'"):
        block_sparse_attention(*inputs_of(plan, dtype=torch.float32), plan, impl=impl)


def test_seen_whole_shows_every_lane_but_padding():
    plan = random_plan(1, (2, 4, 4), globals_=3, padding=5, heads=2, keep=0.5, block_q=8, block_k=8)
    whole = plan.seen_whole([True, False])
    shown = visible_mask(whole)
    assert not shown[:, :, plan.rule.coords[:, 0] == -2].any()
    tile = torch.arange(plan.seqlen_k) // 8
    listed = (tile_states(plan) > 0)[:, torch.arange(plan.seqlen_q) // 8][:, :, tile]
    assert torch.equal(shown[0], listed[0] & (plan.rule.coords[:, 0] != -2))
    assert torch.equal(shown[1], visible_mask(plan)[1])
    assert plan.seen_whole([True, True]).rule is None
