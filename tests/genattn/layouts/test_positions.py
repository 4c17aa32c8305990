"""Layouts read from positions: whole rasters in order are found, everything else is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

from genattn.layouts.positions import packed, raster_shape, rasters, spread_table

SHAPES = st.tuples(*[st.integers(1, 5)] * 3)
STEPS = st.floats(0.25, 40.0)


def places(shape: tuple[int, ...], steps: tuple[float, ...], start: float = 0.0) -> torch.Tensor:
    axes = [start + torch.arange(n, dtype=torch.float64) * step for n, step in zip(shape, steps, strict=True)]
    return torch.tensor(list(itertools.product(*(axis.tolist() for axis in axes))), dtype=torch.float64)


@given(SHAPES, st.tuples(STEPS, STEPS, STEPS))
def test_a_raster_is_found_at_any_spacing(shape: tuple[int, ...], steps: tuple[float, ...]) -> None:
    assert raster_shape(places(shape, steps)) == shape


@given(SHAPES.filter(lambda shape: math.prod(shape) > 2), st.randoms(use_true_random=False))
def test_a_shuffled_or_broken_raster_is_none(shape: tuple[int, ...], random: object) -> None:
    whole = places(shape, (1.0, 1.0, 1.0))
    order = torch.arange(len(whole))
    order[0], order[1] = 1, 0
    assert raster_shape(whole[order]) is None
    doubled = torch.cat([whole, whole[-1:]])
    assert raster_shape(doubled) is None


def test_images_end_where_other_columns_change() -> None:
    ids = torch.cat([torch.cat([torch.full((h * w, 1), float(n)), places((h, w), (1.0, 1.0)).float()], 1)
                     for n, (h, w) in enumerate([(3, 4), (2, 2)])])  # fmt: skip
    assert rasters(ids, first=1) == [(3, 4), (2, 2)]
    assert rasters(ids[:-1], first=1) is None


def sequence(frames: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Text, a reference, sound, video."""
    parts = [
        torch.zeros(4, 3),
        places((1, 2, 3), (1.0, 1.0, 1.0), 4.0),
        torch.zeros(5, 3),
        places((frames, 2, 3), (1.5, 1.0, 1.0), 4.0),
    ]
    lengths = [len(part) for part in parts]
    starts = [0, *itertools.accumulate(lengths)]
    rows = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
    noise = torch.cat([torch.full((n,), level) for n, level in zip(lengths, (0, 2, 1, 0), strict=True)])
    return {"text": rows[0], "audio": rows[2], "reference": torch.cat([rows[1], rows[3]])}, torch.cat(parts), noise


def test_a_packed_sequence() -> None:
    rows, where, noise = sequence()
    found = packed(len(where), rows, where, noise)  # type: ignore[arg-type]
    assert found is not None
    assert found.describe() == "text 4 + reference 1x2x3 + audio 5 + grid 3x2x3"


def test_noise_tells_a_condition_from_the_video_behind_it() -> None:
    """Without sound between them a frame before the first in time would read as one more frame."""
    where = torch.cat(
        [places((1, 2, 2), (1.0, 1.0, 1.0), 0.0), places((2, 2, 2), (1.0, 1.0, 1.0), 0.0) + torch.tensor([1.0, 0, 0])]
    )
    rows = {"reference": torch.arange(12)}
    together = packed(12, rows, where, None)  # type: ignore[arg-type]
    apart = packed(12, rows, where, torch.tensor([1] * 4 + [0] * 8))  # type: ignore[arg-type]
    assert together is not None
    assert apart is not None
    assert together.describe() == "grid 3x2x2"
    assert apart.describe() == "reference 1x2x2 + grid 2x2x2"


@pytest.mark.parametrize("spoil", ["twice", "missing", "outside", "hole", "nothing made"])
def test_a_sequence_that_does_not_add_up_is_none(spoil: str) -> None:
    rows, where, noise = sequence()
    length = len(where)
    if spoil == "twice":
        rows["audio"] = torch.cat([rows["audio"], rows["text"][:1]])
    elif spoil == "missing":
        rows["text"] = rows["text"][1:]
    elif spoil == "outside":
        rows["text"] = rows["text"] + length
    elif spoil == "hole":
        where[-1] = where[-2]
    else:
        rows = {"text": torch.arange(length)}
    assert packed(length, rows, where, noise) is None  # type: ignore[arg-type]


@given(st.tuples(*[st.integers(2, 4)] * 3))
def test_a_rotary_table_tells_its_raster(shape: tuple[int, int, int]) -> None:
    axes = places(shape, (0.3, 0.7, 0.9))
    table = torch.cat([(axes[:, i : i + 1] * torch.tensor([1.0, 0.5], dtype=torch.float64)).cos() for i in range(3)], dim=1)
    assert spread_table(torch.cat([table, torch.ones(len(table), 2, dtype=torch.float64)], dim=1)) == shape


def test_a_table_that_mixes_axes_tells_nothing() -> None:
    axes = places((2, 3, 4), (1.0, 1.0, 1.0))
    assert spread_table(axes.sum(dim=1, keepdim=True).cos()) is None
    assert spread_table(torch.ones(12, 3)) is None
