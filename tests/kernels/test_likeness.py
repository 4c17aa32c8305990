"""Which keys share a pseudo-key: parts by likeness are a partition, of equal size, and find what is alike."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import run_tiles
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.plan.tail import Tail
from genattn.kernels.reference import likeness, tail as tail_module
from genattn.kernels.reference.likeness import parts_by_likeness, parts_of_tiles
from genattn.kernels.reference.tail import members_of, tail_keys


def tail_over(tiles: torch.Tensor, seqlen: int) -> Tail:
    """A plan that visits one tile of each row has all others stood in for."""
    states = 2 * torch.eye(len(tiles), dtype=torch.int32)[None]
    tail = plan_from_states(states, tiles, tiles, None, seqlen, seqlen).with_tail("mean2").tail
    assert tail is not None
    return tail


@settings(deadline=None, max_examples=40)
@given(
    seqlen=st.integers(17, 70),
    block=st.integers(2, 16),
    heads=st.integers(1, 3),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_parts_share_out_the_keys_that_count_evenly(seqlen, block, heads, masked, seed):
    draw = torch.Generator().manual_seed(seed)
    tiles = run_tiles(seqlen, block)
    key = torch.randn(2, seqlen, heads, 4, generator=draw)
    mask = torch.rand(2, seqlen, generator=draw) < 0.6 if masked else None
    found = parts_by_likeness(key, tail_over(tiles, seqlen), mask)
    assert found.shape[:2] == (2, heads)
    for b in range(2):
        for h in range(heads):
            for tile, parts in zip(tiles, found[b, h].unflatten(0, (-1, 2))):
                count = [t for t in tile.tolist() if t >= 0 and (mask is None or mask[b, t])]
                members = [[t for t in part.tolist() if t >= 0] for part in parts]
                assert sorted(members[0] + members[1]) == sorted(count), "each key that counts, once"
                assert [len(m) for m in members] == [math.ceil(len(count) / 2), len(count) // 2]


def test_an_object_and_its_background_come_apart():
    """Half of each box is one thing, in any order of its keys; halves by place would mix them."""
    draw = torch.Generator().manual_seed(0)
    thing = (torch.arange(64) * 7 % 16 < 8).view(1, 64, 1, 1)
    key = torch.where(thing, 3.0, -1.0) * torch.randn(1, 1, 2, 8, generator=draw) + 0.1 * torch.randn(
        1, 64, 2, 8, generator=draw
    )
    tail = tail_over(run_tiles(64, 16), 64)
    for part in parts_by_likeness(key, tail).flatten(0, 2):
        assert len(set(thing.flatten()[part.long()].tolist())) == 1
    assert any(len(set(thing.flatten()[part.long()].tolist())) == 2 for part in tail.tokens), "by place they are mixed"


def test_the_type_of_the_keys_changes_nothing():
    key = torch.randn(2, 96, 2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    tail = tail_over(run_tiles(96, 16), 96)
    first = parts_by_likeness(key, tail)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(parts_by_likeness(key.to(dtype), tail), first)


def test_few_tiles_at_a_time_are_the_same(monkeypatch):
    key = torch.randn(1, 96, 2, 8, generator=torch.Generator().manual_seed(2))
    tail = tail_over(run_tiles(96, 16), 96)
    whole = parts_by_likeness(key, tail)
    monkeypatch.setattr("genattn.kernels.reference.likeness._AT_ONCE", {"cpu": 1})
    assert torch.equal(parts_by_likeness(key, tail), whole)


def test_equal_keys_keep_their_order():
    tail = tail_over(run_tiles(32, 8), 32)
    assert torch.equal(parts_by_likeness(torch.ones(1, 32, 1, 4), tail)[0, 0], tail.tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_key_stays_in_its_tile(bad):
    """Whatever it does to its own tile: no hidden key takes its place, and other tiles are as they were."""
    key = torch.randn(1, 32, 1, 4, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(32)[None] % 8 != 7
    tail = tail_over(run_tiles(32, 8), 32)
    clean = parts_by_likeness(key, tail, mask)
    key[0, 9] = bad
    found = parts_by_likeness(key, tail, mask)
    other = torch.arange(8) // 2 != 1
    assert torch.equal(found[:, :, other], clean[:, :, other])
    mine = found[0, 0, ~other].flatten()
    assert sorted(mine[mine >= 0].tolist()) == list(range(8, 15))
    pseudo = tail_keys(key, key, tail, mask)
    assert pseudo.key[0, other].isfinite().all()
    assert not pseudo.key[0, ~other].isfinite().all(), "a bad key is not lost in silence"


def test_one_part_is_the_tile_without_its_hidden_keys():
    tail = tail_over(run_tiles(32, 8), 32)
    plan = plan_from_states(2 * torch.eye(4, dtype=torch.int32)[None], run_tiles(32, 8), run_tiles(32, 8), None, 32, 32)
    one = plan.with_tail("mean").tail
    assert one is not None
    key, mask = torch.randn(1, 32, 1, 4), torch.arange(32)[None] % 3 > 0
    expected = torch.where(mask[0][one.tokens.long()], one.tokens, -1)
    assert torch.equal(members_of(key, one, mask)[0, 0], expected)
    assert members_of(key, tail).shape == (1, 1, 8, 4)


@pytest.mark.parametrize("hidden", [2, 6, 12])
def test_keys_that_do_not_count_leave_no_trace_where_all_others_are_far_from_zero(hidden):
    """Their rows are zeros: seen from keys with a common offset they would be the farthest of all."""
    draw = torch.Generator().manual_seed(hidden)
    key = 40.0 + torch.randn(1, 16, 2, 8, generator=draw)
    mask = torch.rand(1, 16, generator=draw).argsort() >= hidden
    kept = mask[0].nonzero()[:, 0]
    found = parts_of_tiles(key, torch.arange(16)[None], 2, mask)
    alone = parts_of_tiles(key[:, kept], torch.arange(len(kept))[None], 2)
    for part, expected in zip(found.flatten(0, 2), alone.flatten(0, 2)):
        assert part[part >= 0].tolist() == kept[expected[expected >= 0].long()].tolist()


@pytest.mark.compiled
@pytest.mark.parametrize("masked", [False, True])
def test_transforms_and_a_whole_graph_go_through_the_definition(masked):
    """No question whose answer a tensor holds, and nothing written in place into what is not batched."""
    plan = random_plan(3, keep=0.4).with_tail("mean2")
    assert plan.tail is not None
    query, key = (torch.randn(3, 1, plan.seqlen_k, 2, 8) for _ in range(2))
    mask = torch.rand(3, 1, plan.seqlen_k) < 0.7

    def answer(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        key_mask = mask if masked else None
        return block_sparse_attention(query, key, key, plan, key_mask=key_mask, impl="reference")  # type: ignore[return-value]

    expected = torch.stack([answer(*each) for each in zip(query, key, mask)])
    torch.testing.assert_close(torch.func.vmap(answer)(query, key, mask), expected)
    whole = torch.compile(answer, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(query[0], key[0], mask[0]), expected[0])


def test_keys_of_a_fused_projection_are_copied_once(monkeypatch):
    """Not for every few tiles that are gathered: the time would grow with the square of the length."""
    fused = torch.randn(1, 96, 3 * 2 * 8, generator=torch.Generator().manual_seed(2))
    key = fused.chunk(3, -1)[1].unflatten(-1, (2, 8))
    assert not key.is_contiguous()
    tail = tail_over(run_tiles(96, 16), 96)
    expected = tail_keys(key.contiguous(), key.contiguous(), tail)
    asked: list[bool] = []
    gather = likeness.rows_by_head
    for place in (likeness, tail_module):
        monkeypatch.setattr(place, "rows_by_head", lambda x, rows: (asked.append(x.is_contiguous()), gather(x, rows))[1])
    monkeypatch.setattr(likeness, "_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(tail_module, "_GATHERED_AT_ONCE", 1)
    found = tail_keys(key, key, tail)
    assert len(asked) > 12
    assert all(asked)
    assert torch.equal(found.key, expected.key)
    assert torch.equal(found.members, expected.members)
