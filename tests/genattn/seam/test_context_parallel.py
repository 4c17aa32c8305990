"""Diffusers' own context parallelism: gloo processes on the CPU give what one gives, with plugins on."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # so do the processes
import shared_sequence

from genattn import GenAttnError, NeighborhoodPattern, TokenLayout
from genattn.geometry.token_layout import Segment
from genattn.kernels.plan.first_queries import of_first_queries
from genattn.kernels.reference.attention import reference_attention
from genattn.pipelines.tiny.random.build import build_model
from genattn.seam.context_parallel import (
    Part,
    _heads_of_each,
    _ordered,
    enable_ulysses,
    gathered,
    has_text_apart,
    held_by_each,
    places_of,
    split_of,
    why_not_enable,
)


def test_gathered_order() -> None:
    assert gathered(TokenLayout.from_grid((3, 4, 2)), 2) == TokenLayout(
        (Segment("grid", (3, 4, 2), 0, 12), Segment("grid", (3, 4, 2), 12, 24))
    )
    joint = gathered(TokenLayout.from_grid((4, 6), text_before=10), 2)
    assert joint.segments == (
        Segment("text", (5,)),
        Segment("grid", (4, 6), 0, 12),
        Segment("text", (5,)),
        Segment("grid", (4, 6), 12, 24),
    )
    assert joint.grid_positions.tolist() == [*range(5, 17), *range(22, 34)]
    with_reference = TokenLayout((Segment("text", (4,)), Segment("grid", (2, 6)), Segment("reference", (2, 2))))
    assert [(s.kind, s.length) for s in gathered(with_reference, 2).segments] == [
        *[("text", 2), ("grid", 8)],
        *[("text", 2), ("grid", 4), ("reference", 4)],
    ]


def test_lengths_that_do_not_divide_are_cut_as_tensor_split_cuts() -> None:
    layout = TokenLayout.from_grid((4, 6), text_before=10)
    cut = gathered(layout, 3)
    assert [(s.kind, s.length) for s in cut.segments] == [
        (k, n) for pair in ((4, 8), (3, 8), (3, 8)) for k, n in zip(("text", "grid"), pair)
    ]
    assert held_by_each(layout, 3) == (12, 11, 11)
    assert held_by_each(layout, 3, text_apart=False) == (12, 11, 11)
    packed = gathered(layout, 3, text_apart=False)
    assert [(s.kind, s.length) for s in packed.segments] == [("text", 10), ("grid", 2), ("grid", 11), ("grid", 11)]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 7), st.integers(0, 9), st.integers(1, 4), st.booleans(), st.data())
def test_every_token_has_one_place(
    before: int, rows: int, columns: int, after: int, world: int, apart: bool, data: Any
) -> None:
    layout = TokenLayout.from_grid((rows, columns), text_before=before, text_after=after)
    first = data.draw(st.integers(0, world - 1))
    cut, places = gathered(layout, world, apart, first), places_of(layout, world, apart, first)
    assert places.sort().values.tolist() == list(range(layout.seqlen))
    assert torch.equal(cut.raster_index, layout.raster_index[places])
    own = held_by_each(layout, world, apart)[first]
    streams = (
        [(0, before), (before, before + rows * columns), (before + rows * columns, layout.seqlen)]
        if apart
        else [(0, layout.seqlen)]
    )
    assert places[:own].tolist() == [
        n for low, high in streams for n in torch.arange(low, high).tensor_split(world)[first].tolist()
    ]


@pytest.mark.parametrize("apart", [True, False])
def test_a_ring_in_one_process(apart: bool) -> None:
    """Each process's rows, under the plan cut to them, are the rows of the whole answer."""
    layout, world = TokenLayout.from_grid((3, 7, 5), text_before=8), 3
    pattern = NeighborhoodPattern((3, 3, 3), tail="mean")
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, layout.seqlen, 2, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    wanted = reference_attention(query, key, value, pattern.plan(layout, 16, 16))[0]
    for rank in range(world):
        places = places_of(layout, world, apart, rank)
        own = held_by_each(layout, world, apart)[rank]
        plan = of_first_queries(pattern.plan(gathered(layout, world, apart, rank), 16, 16), own)
        q, k, v = (x.index_select(1, places) for x in (query, key, value))
        torch.testing.assert_close(reference_attention(q[:, :own], k, v, plan)[0], wanted.index_select(1, places[:own]))


def test_whether_text_is_cut_by_itself_is_read_from_the_plan() -> None:
    from older_diffusers import needs  # here, because the processes import this file

    assert has_text_apart(build_model("flux"))
    needs("minimax-h3")
    assert not has_text_apart(build_model("minimax-h3"))
    model = build_model("minimax-h3")
    hook = SimpleNamespace(metadata={"encoder_hidden_states": object()})
    model.transformer_blocks[0]._diffusers_hook = SimpleNamespace(hooks={"cp_input---blocks": hook})
    assert has_text_apart(model)  # the user's own plan


def test_kinds_of_splits() -> None:
    def config(**changes: Any) -> Any:
        return SimpleNamespace(context_parallel_config=SimpleNamespace(**{"ring_degree": 1, "ulysses_degree": 1, **changes}))

    assert split_of(config(ring_degree=2)) == split_of(config(ring_degree=2, ulysses_degree=2)) == "ring"
    assert split_of(config(ulysses_degree=2)) == "ulysses"
    assert split_of(config(ulysses_degree=2, ulysses_anything=True)) == "ulysses_anything"
    assert split_of(object()) == ""


def test_every_process_needs_a_head() -> None:
    assert _heads_of_each(10, 5, 3) == ([2, 2, 1], [4, 4, 2])
    with pytest.raises(GenAttnError, match="every process needs a head, got 2 heads for ulysses_degree=3; use at most 2"):
        _heads_of_each(4, 2, 3)


def test_a_mask_over_all_tokens_follows_their_order() -> None:
    layout = TokenLayout.from_grid((2, 3), text_before=2)
    part = Part(held_by_each(layout, 2), 1, 0, 1)
    assert part.only_first
    places = places_of(layout, 2, True, 1)
    square = torch.arange(64).view(1, 1, 8, 8)
    assert torch.equal(_ordered(square, part, places), square[:, :, places[:4]][..., places])
    assert torch.equal(_ordered(square[:, :, :1], part, places), square[:, :, :1][..., places])
    assert _ordered(square, part, None) is square


def test_sharing_a_clip_is_refused_with_the_reason() -> None:
    model = build_model("wan")
    enable_ulysses(model, 1, 7)  # nothing to do
    with pytest.raises(GenAttnError, match="context_parallel=2 cannot be served"):
        enable_ulysses(model, 2, 48)
    if torch.cuda.device_count() < 2:
        assert "2 CUDA GPUs, this machine has" in why_not_enable(model, 2, 48)
    assert "heads and 49 tokens" in why_not_enable(model, 2, 49)
    assert "no context-parallel plan" in why_not_enable(build_model("animatediff"), 2, 48)


@pytest.mark.slow
@pytest.mark.parametrize("world", shared_sequence.CASES)
def test_processes_give_what_one_gives(world: int, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.40", reason="splits of any length came later")
    mp.spawn(shared_sequence.rank_of, args=(world, str(tmp_path)), nprocs=world, join=True)
    assert len(list(tmp_path.glob("done*"))) == world
