"""Plans in other kernels' forms, decoded by those kernels' own rules, are the token mask of the plan."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.attention.flex_attention import flex_attention

from genattn import NeighborhoodPattern, RadialPattern, TokenLayout
from genattn.geometry.token_layout import Segment
from genattn.kernels.peers.block_lists import (
    FlashAttention4,
    FlashInferBSR,
    FlashInferVariable,
    Order,
    flash_attention_4,
    flashinfer_bsr,
    flashinfer_variable,
    flex_block_mask,
    reordered,
    restored,
)
from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.patterns.combine import PerHead
from genattn.patterns.dense import DensePattern


def in_tokens(places: torch.Tensor, order: Order | None, plan: BlockPlan) -> torch.Tensor:
    """Bool [N, Sq, Sk] from what places see, [N, queries, keys]; a place without a token must be seen by nobody that counts."""
    rows, columns = (plan.seqlen_q, plan.seqlen_k) if order is None else (len(order.queries), len(order.keys))
    queries = torch.arange(rows) if order is None else order.queries
    keys = torch.arange(columns) if order is None else order.keys
    assert not places[:, :rows][:, queries >= 0][:, :, :columns][:, :, keys < 0].any(), "an empty place is seen"
    seen = torch.zeros(places.shape[0], plan.seqlen_q, plan.seqlen_k, dtype=torch.bool)
    part = places[:, :rows, :columns][:, queries >= 0][:, :, keys >= 0]
    seen[:, queries[queries >= 0][:, None], keys[keys >= 0][None]] = part
    return seen


def decode_bsr(form: FlashInferBSR, heads: int) -> torch.Tensor:
    """SciPy's bsr_matrix with a mask per stored block, one `plan` call per head."""
    seen = torch.zeros(heads, form.M, form.N, dtype=torch.bool)
    for head in range(heads):
        given = form.of_head(head)
        assert given["indptr"][0] == 0
        for row in range(form.M // form.R):
            for entry in range(int(given["indptr"][row]), int(given["indptr"][row + 1])):
                column = int(given["indices"][entry])
                block = given["mask"][entry] if "mask" in given else True
                seen[head, row * form.R : (row + 1) * form.R, column * form.C : (column + 1) * form.C] = block
    return seen


def decode_variable(form: FlashInferVariable, heads: int) -> torch.Tensor:
    seen = []
    for head in range(heads):
        own = head if form.block_mask_map.shape[0] > 1 else 0
        rows, columns = form.block_row_sz[own].long(), form.block_col_sz[own].long()
        seen.append(form.block_mask_map[own].repeat_interleave(rows, 0).repeat_interleave(columns, 1))
    return torch.stack(seen)


def decode_lists(form: FlashAttention4, heads: int, rows: int, columns: int) -> torch.Tensor:
    """A kernel walks the listed tiles only, asks mask_mod in partial ones, and cuts at the lengths."""
    block_q, block_k = form.block_size
    lists = form.mask_block_cnt.shape[1]
    tiles, keys = form.mask_block_cnt.shape[2], -(-columns // block_k)
    seen = torch.zeros(heads, tiles * block_q, keys * block_k, dtype=torch.bool)
    for head in range(heads):
        own = head if lists > 1 else 0
        for tile in range(tiles):
            q = torch.arange(block_q)[:, None] + tile * block_q
            for counts, indices, partial in (
                (form.mask_block_cnt, form.mask_block_idx, True),
                (form.full_block_cnt, form.full_block_idx, False),
            ):
                assert counts.dtype == indices.dtype == torch.int32
                for column in indices[0, own, tile, : int(counts[0, own, tile])].tolist():
                    k = torch.arange(block_k)[None] + column * block_k
                    block = form.mask_mod(torch.tensor(0), torch.tensor(head), q, k) if partial else torch.tensor(True)
                    assert not seen[head, q, k].any(), "a tile is listed twice"
                    seen[head, q, k] = block
    return seen[:, :rows, :columns]


def places_of(order: Order | None, plan: BlockPlan) -> tuple[int, int]:
    return (plan.seqlen_q, plan.seqlen_k) if order is None else (len(order.queries), len(order.keys))


PATTERNS: dict[str, Callable[[], Any]] = {
    "radial": lambda: RadialPattern(tail=None, decay=0.3),
    "windows of boxes": lambda: NeighborhoodPattern((2, 3, 4), stride=(1, 3, 2)),
    "windows of runs": lambda: NeighborhoodPattern((2, 3, 4), tile="runs"),
    "causal": lambda: NeighborhoodPattern((2, 3, 4), is_causal=(True, False, False)),
    "heads differ": lambda: PerHead((RadialPattern(tail=None), DensePattern()), (0, 1, 1, 0)),
    "dense": DensePattern,
}


def held(plan: BlockPlan) -> None:
    """All forms of a plan against its token mask, and against each other's counts."""
    heads = plan.mask_heads
    want = visible_mask(plan).expand(heads, -1, -1)
    bsr = flashinfer_bsr(plan)
    assert bsr.heads in (1, heads)
    assert torch.equal(in_tokens(decode_bsr(bsr, heads), bsr.order, plan), want)
    four = flash_attention_4(plan)
    rows, columns = places_of(four.order, plan)
    assert torch.equal(in_tokens(decode_lists(four, heads, rows, columns), four.order, plan), want)
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    everywhere = torch.stack([four.mask_mod(torch.tensor(0), torch.tensor(h), q, k) for h in range(heads)])
    assert torch.equal(in_tokens(everywhere, four.order, plan), want), "mask_mod must hold outside of partial tiles too"
    block_mask, _ = flex_block_mask(plan)
    assert torch.equal(block_mask.kv_num_blocks[0], four.mask_block_cnt[0])
    assert torch.equal(block_mask.full_kv_num_blocks[0], four.full_block_cnt[0])
    assert block_mask.seq_lengths == (rows, columns)
    if plan.full_share == 1.0:
        variable = flashinfer_variable(plan)
        assert torch.equal(in_tokens(decode_variable(variable, heads), variable.order, plan), want)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 16), (4, 16), (3, 24)]),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([1.0, 0.6]),
)
def test_drawn_plans(seed: int, sizes: tuple[int, int], scattered: bool, padding: int, keep: float) -> None:
    heads, block_k = sizes
    held(random_plan(seed, (2, 3, 5), padding=padding, heads=heads, scattered=scattered, keep=keep, block_k=block_k))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(list(PATTERNS)),
    st.tuples(st.integers(2, 4), st.integers(3, 6), st.integers(4, 6)),
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from([(16, 16), (16, 32), (32, 16)]),
)
def test_real_patterns(name: str, grid: tuple[int, int, int], before: int, after: int, blocks: tuple[int, int]) -> None:
    """Text on both sides, ends that do not divide, boxes with unused lanes, masks per head."""
    held(PATTERNS[name]().plan(TokenLayout.from_grid(grid, text_before=before, text_after=after), *blocks))


def test_padding_is_never_a_key() -> None:
    layout = TokenLayout((Segment("text", (5,)), Segment("grid", (3, 4, 5)), Segment("padding", (9,))))
    held(RadialPattern(tail=None).plan(layout, 16, 16))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([1, 4]), st.integers(1, 15), st.booleans())
def test_whole_tiles_of_any_size(seed: int, heads: int, cut: int, shuffled: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = 64 + cut
    tiles = run_tiles(tokens, 16)
    if shuffled:
        order = torch.randperm(tokens, generator=draw).int()
        tiles = torch.where(tiles >= 0, order[tiles.clamp_min(0).long()], -1)
        tiles[0, 3:7] = -1  # those tokens are nobody's keys
    query_tiles = run_tiles(tokens, 16)
    states = 2 * (torch.rand(heads, len(query_tiles), len(tiles), generator=draw) < 0.5).int()
    held(plan_from_states(states, query_tiles, tiles, None, tokens, tokens))


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_with_the_exported_mask_is_the_definition(name: str) -> None:
    layout = TokenLayout.from_grid((3, 4, 5), text_before=3, text_after=4)
    plan = PATTERNS[name]().plan(layout, 16, 16)
    q, k, v = (torch.randn(2, layout.seqlen, 4, 16, dtype=torch.float64) for _ in range(3))
    mask, order = flex_block_mask(plan)
    sides = (None, None, None) if order is None else (order.queries, order.keys, order.keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says once that it is not compiled
        out = flex_attention(*(reordered(x, s).transpose(1, 2) for x, s in zip((q, k, v), sides)), block_mask=mask)
    got = restored(out.transpose(1, 2), sides[0], layout.seqlen)
    torch.testing.assert_close(got, reference_attention(q, k, v, plan)[0])


def test_a_kernel_of_whole_tiles_gives_the_definition_through_the_order() -> None:
    """Put in order, one softmax per tile row over its sizes, put back."""
    plan = plan_from_states(
        2 * torch.eye(3, dtype=torch.int)[None],
        torch.tensor([[4, 0, -1], [1, 5, 2], [3, -1, 6]], dtype=torch.int32),
        torch.tensor([[0, 4, -1], [5, 2, 1], [6, 3, -1]], dtype=torch.int32),
        None, 7, 7,
    )  # fmt: skip
    form = flashinfer_variable(plan)
    assert form.order is not None
    assert form.block_row_sz.tolist() == [[2, 3, 2]]
    q, k, v = (torch.randn(1, 7, 1, 4, dtype=torch.float64) for _ in range(3))
    seen = decode_variable(form, 1)[0]
    sides = (form.order.queries, form.order.keys, form.order.keys)
    out = F.scaled_dot_product_attention(*(reordered(x, s).transpose(1, 2) for x, s in zip((q, k, v), sides)), attn_mask=seen)
    torch.testing.assert_close(restored(out.transpose(1, 2), sides[0], 7), reference_attention(q, k, v, plan)[0])


@pytest.mark.parametrize("make", [flashinfer_bsr, flashinfer_variable, flash_attention_4, flex_block_mask])
def test_a_tail_is_refused(make: Callable[[BlockPlan], Any]) -> None:
    plan = NeighborhoodPattern((2, 2, 2), tail="mean").plan(TokenLayout.from_grid((4, 8, 8)), 16, 16)
    with pytest.raises(ValueError, match="no stand-in for skipped tiles, the plan has tail='mean'"):
        make(plan)


def test_variable_blocks_are_seen_whole() -> None:
    with pytest.raises(ValueError, match="of this plan's tiles need the element rule; use flashinfer_bsr"):
        flashinfer_variable(NeighborhoodPattern((2, 2, 2)).plan(TokenLayout.from_grid((4, 5, 6)), 16, 16))
