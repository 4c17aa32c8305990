"""Editing the frame marginal of full attention, against the definition on the full map in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.guidance.broadway.frame_marginal import edited_attention, restrict_keys
from genattn.guidance.broadway.frame_marginal_approx import pooled_edit, same_place_rows
from genattn.guidance.broadway.frame_marginal_reference import frame_rows, full_map, reference_edit
from genattn.guidance.broadway.key_frames import KeyFrames, key_frames
from genattn.guidance.broadway.motion import motion_attention, motion_map
from genattn.guidance.broadway.temporal_map import MapEdit
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, dense_plan, run_tiles
from genattn.kernels.plan.element_rule import GridRule, PerHeadRule
from genattn.kernels.plan.random_plan import plan_from_states, random_fade, random_plan
from genattn.kernels.reference.attention import visible_mask

EDITS = (
    MapEdit(),
    MapEdit(0.0, 1.0),
    MapEdit(0.3, energy=0.4),
    MapEdit("auto", "auto"),
    MapEdit(0.5, 0.5, keep_energy=False),
    MapEdit(0.5, 10.0, tau=3.0),
)


def draw(layout: TokenLayout, batch: int = 2, heads: int = 3, dim: int = 8, seed: int = 0, kv_heads: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, layout.seqlen, h, dim) for h in (heads, kv_heads or heads, kv_heads or heads)]
    return [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]


def anchor_for(frames: KeyFrames, batch: int = 2, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, frames.queries.numel(), heads, frames.frames, generator=generator).softmax(-1)


grids = st.tuples(st.integers(2, 7), st.integers(1, 3), st.integers(1, 4))


@given(
    grids,
    st.integers(0, 3),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(EDITS),
    st.booleans(),
    st.sampled_from([1 << 28, 3000, 300]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_full_map(
    grid: tuple[int, int, int], before: int, after: int, keep_first: bool, edit: MapEdit, anchored: bool, chunk: int
) -> None:
    layout = TokenLayout.from_grid(grid, before, after)
    if grid[0] - keep_first < 2:
        return
    frames = key_frames(layout, keep_first)
    query, key, value = draw(layout)
    anchor = anchor_for(frames) if anchored else None
    got = edited_attention(query, key, value, frames, edit, anchor=anchor, conditional=slice(1, 2), chunk_bytes=chunk)
    want, scalars = reference_edit(query, key, value, frames, edit, anchor=anchor, conditional=slice(1, 2))
    factor = max(1.0, float(scalars.beta))
    torch.testing.assert_close(got.out.double(), want, atol=2e-5 * factor, rtol=1e-3)
    torch.testing.assert_close(got.scalars.beta, scalars.beta, atol=1e-3, rtol=1e-3)
    rows, _ = frame_rows(full_map(query, key), frames)
    torch.testing.assert_close(got.rows.double(), rows, atol=1e-5, rtol=0)


def test_nothing_edited_is_stock_attention() -> None:
    layout = TokenLayout.from_grid((5, 4, 6), 3, 2)
    query, key, value = draw(layout, dim=16)
    stock = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    got = edited_attention(query, key, value, key_frames(layout), MapEdit(0.0, 1.0))
    torch.testing.assert_close(got.out, stock, atol=1e-5, rtol=0)


def test_one_token_per_frame_is_the_published_method() -> None:
    layout = TokenLayout.from_grid((16, 1, 1))
    query, key, value = draw(layout, heads=4)
    other_query, other_key, _ = draw(layout, heads=4, seed=1)
    anchor = motion_map(other_query, other_key)
    want, numbers = motion_attention(motion_map(query, key), value, MapEdit(), anchor=anchor, conditional=slice(1, 2))
    got = edited_attention(
        query, key, value, key_frames(layout), MapEdit(), anchor=anchor.transpose(1, 2), conditional=slice(1, 2)
    )
    torch.testing.assert_close(got.out, want, atol=1e-5, rtol=1e-4)
    for name in ("alpha", "beta", "e1", "e2", "e3", "disparity"):
        torch.testing.assert_close(getattr(got.scalars, name), getattr(numbers, name), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 100), st.sampled_from(EDITS[:4]))
@settings(max_examples=20, deadline=None)
def test_kept_keys_keep_their_mass_and_rows_sum_to_one(seed: int, edit: MapEdit) -> None:
    layout = TokenLayout.from_grid((4, 2, 3), 0, 5)
    frames = key_frames(layout)
    query, key, _ = draw(layout, seed=seed)
    # values that mark where the mass went: one column for the text, one for everything
    value = torch.zeros(2, layout.seqlen, 3, 8)
    value[:, frames.kept, :, 0] = 1
    value[..., 1] = 1
    got = edited_attention(query, key, value, frames, edit, anchor=anchor_for(frames)).out[:, frames.queries]
    text = full_map(query, key)[..., frames.kept].sum(-1).transpose(1, 2)[:, frames.queries]
    torch.testing.assert_close(got[..., 0].double(), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[..., 1], torch.ones_like(got[..., 1]), atol=2e-4, rtol=0)


def test_energy_never_falls() -> None:
    layout = TokenLayout.from_grid((6, 2, 2), 0, 3)
    frames = key_frames(layout)
    for seed in range(8):
        tensors = draw(layout, seed=seed)
        result = edited_attention(*tensors, frames, MapEdit(0.8, 1.0), anchor=anchor_for(frames))
        assert float(result.scalars.e3) >= float(result.scalars.e1) * (1 - 1e-5)


def test_key_mask_hides_padded_text() -> None:
    layout = TokenLayout.from_grid((3, 2, 2), 0, 4)
    frames = key_frames(layout)
    query, key, value = draw(layout)
    mask = torch.ones(2, layout.seqlen, dtype=torch.bool)
    mask[0, -3:] = False
    mask[1, -1:] = False
    key[0, -3:], value[0, -3:] = 1e4, float("nan")
    got = edited_attention(query, key, value, frames, MapEdit(), anchor=anchor_for(frames), key_mask=mask)
    clean = torch.where(mask[..., None, None], value, torch.zeros(()))
    want, _ = reference_edit(query, key, clean, frames, MapEdit(), anchor=anchor_for(frames), visible=mask[:, None, None, :])
    torch.testing.assert_close(got.out.double(), want, atol=2e-5, rtol=1e-3)


def test_scattered_grid_and_grouped_heads() -> None:
    layout = TokenLayout(
        (Segment("text", (2,)), Segment("grid", (4, 2, 2), 8, 16), Segment("reference", (3,)), Segment("grid", (4, 2, 2), 0, 8))
    )
    frames = key_frames(layout)
    query, key, value = draw(layout, heads=4, kv_heads=2)
    wide = [x.repeat_interleave(2, 2) for x in (key, value)]
    anchor = anchor_for(frames, heads=2)  # another head count: every head is pulled to the mean
    got = edited_attention(query, key, value, frames, MapEdit(), anchor=anchor, chunk_bytes=500)
    want, _ = reference_edit(query, *wide, frames, MapEdit(), anchor=anchor.mean(2, keepdim=True).expand(-1, -1, 4, -1))
    torch.testing.assert_close(got.out.double(), want, atol=2e-5, rtol=1e-3)


def test_bfloat16_keeps_a_float32_map() -> None:
    layout = TokenLayout.from_grid((5, 3, 3), 2)
    frames = key_frames(layout)
    tensors = [x.bfloat16() for x in draw(layout)]
    got = edited_attention(*tensors, frames, MapEdit(), anchor=anchor_for(frames))
    want, scalars = reference_edit(*(x.float() for x in tensors), frames, MapEdit(), anchor=anchor_for(frames))
    assert got.out.dtype == torch.bfloat16
    assert got.rows.dtype == torch.float32
    assert float(got.scalars.e1) == pytest.approx(float(scalars.e1), rel=1e-2)
    assert float((got.out.double() - want).abs().max()) < 0.05


def test_beta_given_is_used() -> None:
    layout = TokenLayout.from_grid((4, 2, 2))
    tensors = draw(layout)
    result = edited_attention(*tensors, key_frames(layout), MapEdit(0.0, 1.5), beta=torch.tensor(2.5))
    assert float(result.scalars.beta) == 2.5
    want = edited_attention(*tensors, key_frames(layout), MapEdit(0.0, 2.5))
    torch.testing.assert_close(result.out, want.out)


# ---- under a sparse plan


def window_plan(layout: TokenLayout, block: int = 5) -> tuple[BlockPlan, torch.Tensor]:
    """Frames at distance 2 or more hidden; in neighbours one place around; text sees and is seen."""
    count, height, width = layout.grid3
    index = layout.raster_index
    places = torch.stack([index // (height * width), index // width % height, index % width], 1)
    coords = torch.where(index[:, None] >= 0, places, index[:, None]).to(torch.int32)
    distance = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    cls = torch.where(distance > 1, -1, distance).to(torch.int32)[None]
    longest = max(height, width)
    low = torch.arange(longest, dtype=torch.int32).expand(1, 2, 2, longest).clone()
    size = torch.full((1, 2, 2, longest), longest * 2, dtype=torch.int32)
    low[:, 0] = 0
    low[:, 1] -= 1
    size[:, 1] = 3
    rule = GridRule(coords, cls, low, size, (height, width))
    whole = dense_plan(layout.seqlen, layout.seqlen, block, block)
    plan = BlockPlan(
        whole.query_tiles,
        whole.key_tiles,
        whole.row_ptr,
        whole.columns,
        torch.zeros_like(whole.num_full),
        rule,
        layout.seqlen,
        layout.seqlen,
    )
    return plan, visible_mask(plan)


@pytest.mark.parametrize("edit", EDITS[:4])
@pytest.mark.parametrize("keep_first", [False, True])
def test_under_a_sparse_plan_it_is_the_marginal_of_the_sparse_map(edit: MapEdit, keep_first: bool) -> None:
    layout = TokenLayout.from_grid((5, 3, 2), 2, 1)
    frames = key_frames(layout, keep_first)
    query, key, value = draw(layout)
    plan, visible = window_plan(layout)
    assert not bool(visible.all())
    anchor = anchor_for(frames)
    got = edited_attention(query, key, value, frames, edit, anchor=anchor, plan=plan, chunk_bytes=1)
    want, scalars = reference_edit(query, key, value, frames, edit, anchor=anchor, visible=visible[None])
    torch.testing.assert_close(got.scalars.beta, scalars.beta, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got.out.double(), want, atol=2e-5 * max(1.0, float(scalars.beta)), rtol=1e-3)


def test_plans_that_differ_between_heads() -> None:
    layout = TokenLayout.from_grid((5, 3, 2), 2, 1)
    frames, anchor = key_frames(layout), anchor_for(key_frames(layout))
    query, key, value = draw(layout)
    plan, visible = window_plan(layout)
    whole = dense_plan(layout.seqlen, layout.seqlen, 5, 5)
    assert isinstance(plan.rule, GridRule)
    everything = replace(plan.rule, frame_class=torch.zeros_like(plan.rule.frame_class), width=plan.rule.width * 0 + 99)
    everything = replace(everything, low=torch.zeros_like(plan.rule.low))
    rule = PerHeadRule((plan.rule, everything), (0, 1, 0))
    tiles = whole.columns.numel()
    per_head = BlockPlan(
        whole.query_tiles,
        whole.key_tiles,
        torch.cat([whole.row_ptr + tiles * h for h in range(3)]),
        whole.columns.repeat(3),
        torch.zeros(3, whole.query_tiles.shape[0], dtype=torch.int32),
        rule,
        layout.seqlen,
        layout.seqlen,
    )
    seen = torch.stack([visible[0], torch.ones_like(visible[0]), visible[0]])
    assert torch.equal(visible_mask(per_head), seen)
    got = edited_attention(query, key, value, frames, MapEdit(), anchor=anchor, plan=per_head, chunk_bytes=1)
    want, _ = reference_edit(query, key, value, frames, MapEdit(), anchor=anchor, visible=seen[None])
    torch.testing.assert_close(got.out.double(), want, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("kind", ["mean", "mean2"])
def test_with_a_tail_the_marginal_counts_what_is_stood_in_for(kind: str, keep_first: bool) -> None:
    """Keys equal within a tile, tiles across frames: a pseudo-key's mass goes to the frames of its tokens."""
    layout = TokenLayout.from_grid((5, 3, 2), 2, 1)
    frames = key_frames(layout, keep_first)
    query, key, value = draw(layout)
    tiles = run_tiles(layout.seqlen, 5)
    chosen = torch.rand(1, len(tiles), len(tiles), generator=torch.Generator().manual_seed(0)) < 0.5
    plan = plan_from_states(2 * chosen.int(), tiles, tiles, None, layout.seqlen, layout.seqlen).with_tail(kind)
    assert plan.tail is not None
    owner = torch.arange(layout.seqlen) // 5 * 5
    key, value = key[:, owner], value[:, owner]
    anchor = anchor_for(frames)
    got = edited_attention(query, key, value, frames, EDITS[0], anchor=anchor, plan=plan, chunk_bytes=1)
    want, scalars = reference_edit(query, key, value, frames, EDITS[0], anchor=anchor)
    torch.testing.assert_close(got.scalars.beta, scalars.beta, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got.out.double(), want, atol=2e-5 * max(1.0, float(scalars.beta)), rtol=1e-3)


def test_restricted_plan_sees_what_the_plan_sees_of_the_chosen_keys() -> None:
    layout = TokenLayout.from_grid((4, 3, 3), 2)
    plan, visible = window_plan(layout, 4)
    full = dense_plan(layout.seqlen, layout.seqlen, 4, 4)
    tokens = torch.tensor([0, 3, 4, 5, 6, 20, 37])
    member = torch.zeros(layout.seqlen, dtype=torch.bool)
    member[tokens] = True
    for source, seen in ((plan, visible), (full, torch.ones_like(visible))):
        cut = restrict_keys(source, tokens)
        assert torch.equal(visible_mask(cut), seen & member)
        assert cut.columns.numel() < source.columns.numel()
        tensors = draw(layout)
        out = block_sparse_attention(*tensors, cut)
        torch.testing.assert_close(out, block_sparse_attention(*tensors, cut, impl="reference"), atol=1e-5, rtol=1e-4)


# ---- approximations


@pytest.mark.parametrize("masked", [False, True])
def test_pooling_nothing_is_exact_on_top_of_any_base(masked: bool) -> None:
    layout = TokenLayout.from_grid((5, 2, 4), 3)
    frames = key_frames(layout)
    tensors = draw(layout)
    mask = None
    if masked:
        mask = torch.ones(2, layout.seqlen, dtype=torch.bool)
        mask[0, 1], mask[1, 10] = False, False
    edit, anchor = MapEdit(), anchor_for(frames)
    base = edited_attention(*tensors, frames, MapEdit(0.0, 1.0), key_mask=mask).out
    got = pooled_edit(*tensors, frames, (2, 4), edit, base, 1, anchor=anchor, key_mask=mask)
    want = edited_attention(*tensors, frames, edit, anchor=anchor, key_mask=mask)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.out[:, :3], base[:, :3])  # text rows are the base's own


@pytest.mark.parametrize("pool", [2, 3, 50])
@pytest.mark.parametrize("keep_first", [False, True])
def test_pooled_without_an_edit_leaves_the_base_alone(pool: int, keep_first: bool) -> None:
    layout = TokenLayout.from_grid((4, 3, 5), 2)
    frames = key_frames(layout, keep_first)
    base = torch.randn(2, layout.seqlen, 3, 8)
    assert torch.equal(pooled_edit(*draw(layout), frames, (3, 5), MapEdit(0.0, 1.0), base, pool).out, base)


def test_pooled_is_exact_where_cells_hold_equal_tokens() -> None:
    layout = TokenLayout.from_grid((5, 4, 6), 2)
    frames, anchor = key_frames(layout), anchor_for(key_frames(layout))
    query, key, value = draw(layout)
    for x in (key, value):
        cells = torch.randn(2, 5, 2, 3, 3, 8)
        x[:, 2:] = cells.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1, 3)
    base = edited_attention(query, key, value, frames, MapEdit(0.0, 1.0)).out
    got = pooled_edit(query, key, value, frames, (4, 6), MapEdit(), base, 2, anchor=anchor)
    want = edited_attention(query, key, value, frames, MapEdit(), anchor=anchor)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.rows, want.rows, atol=1e-5, rtol=1e-4)


def test_pooled_comes_closer_with_smaller_cells() -> None:
    layout = TokenLayout.from_grid((6, 8, 8), 4)
    frames = key_frames(layout)
    query, key, value = (x * 0.5 for x in draw(layout, dim=16))
    edit, anchor = MapEdit(0.6, 1.5), anchor_for(frames)
    base = edited_attention(query, key, value, frames, MapEdit(0.0, 1.0)).out
    exact = edited_attention(query, key, value, frames, edit, anchor=anchor).out
    change = (exact - base).norm()
    errors = [
        float((pooled_edit(query, key, value, frames, (8, 8), edit, base, p, anchor=anchor).out - exact).norm() / change)
        for p in (1, 2, 8)
    ]
    assert errors[0] < 1e-4
    assert errors[0] < errors[1] < errors[2] < 1.0


def test_same_place_rows_are_one_map_per_place_and_follow_head_counts() -> None:
    layout = TokenLayout.from_grid((3, 2, 2), 1)
    frames = key_frames(layout)
    query, key, _ = draw(layout, heads=4, kv_heads=2)
    rows = same_place_rows(query, key, frames)
    place = frames.tokens[:, 1]
    scores = torch.einsum("thd,uhd->thu", query[0, place], key[0, place].repeat_interleave(2, 1)) / 8**0.5
    torch.testing.assert_close(rows[0, :, 1], scores.softmax(-1), atol=1e-5, rtol=1e-4)


# ---- refusals


@pytest.mark.parametrize(("grid", "keep_first"), [((1, 4, 4), False), ((2, 4, 4), True), ((8, 8), False)])
def test_stills_are_refused(grid: tuple[int, ...], keep_first: bool) -> None:
    with pytest.raises(GenAttnError, match="latent frames, got"):
        key_frames(TokenLayout.from_grid(grid), keep_first)


def test_shapes_that_do_not_fit_are_refused() -> None:
    layout = TokenLayout.from_grid((4, 2, 2))
    frames = key_frames(layout)
    query, key, value = draw(layout)
    with pytest.raises(GenAttnError, match="16 and 16 tokens, got 15 and 16"):
        edited_attention(query[:, 1:], key, value, frames, MapEdit())
    with pytest.raises(GenAttnError, match=r"the anchor must be \[B, 16, H, 4\]"):
        edited_attention(query, key, value, frames, MapEdit(), anchor=torch.ones(2, 16, 3, 5))


def test_dense_parts_are_cut_as_suits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.guidance.broadway import frame_marginal

    cut = []

    def spy(query, key, value, plan, **options):
        cut.append((plan.block_q, plan.block_k))
        return block_sparse_attention(query, key, value, plan, **options)

    monkeypatch.setattr(frame_marginal, "tile_sizes", lambda device, dim, dtype: (64, 32))
    monkeypatch.setattr(frame_marginal, "block_sparse_attention", spy)
    frame_marginal._attend(*draw(TokenLayout.from_grid((2, 5, 7))), None, None)
    assert cut == [(64, 32)]


@pytest.mark.parametrize("kind", [None, "mean2"])
def test_pieces_of_a_faded_plan_add_up_to_it(kind: str | None) -> None:
    """Cut to the keys of each frame, the plan lowers what it lowered whole: the shares of the frames sum to one."""
    layout = TokenLayout.from_grid((5, 3, 2), 2, 1)
    frames = key_frames(layout, False)
    plan = random_plan(3, (5, 3, 2), globals_=3, block_q=4, block_k=4, keep=0.6).with_tail(kind)
    plan = plan.with_fade(random_fade(plan, 1))
    assert plan.fade is not None
    query, key, value = draw(layout)
    whole = block_sparse_attention(query, key, value, plan, return_lse=True)
    pieces = [
        block_sparse_attention(query, key, value, restrict_keys(plan, keys), return_lse=True)
        for keys in (*frames.tokens, frames.kept)
    ]
    lse = torch.stack([sums for _, sums in pieces])
    torch.testing.assert_close(lse.logsumexp(0), whole[1])
    shares = (lse - whole[1]).exp().nan_to_num()
    torch.testing.assert_close((shares[..., None] * torch.stack([out for out, _ in pieces])).sum(0), whole[0])
