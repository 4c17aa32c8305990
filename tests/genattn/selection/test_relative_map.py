"""A map by relative place: its sums, the fit that keeps them, and what it predicts at other sizes."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.selection.relative_map import CellGrid, fit, margins, predict


def _places(grid: CellGrid) -> torch.Tensor:
    axes = [torch.arange(grid.frames).float()]
    axes += [(torch.arange(n) + 0.5) / n for n in (grid.rows, grid.columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_a_map_of_this_form_is_fitted_exactly(frames: int, rows: int, columns: int, seed: int) -> None:
    grid = CellGrid(frames, rows, columns)
    draw = torch.Generator().manual_seed(seed)
    r = torch.rand(2, *grid.offset_shape, generator=draw).flatten(1) + 0.1
    a, b = (torch.rand(2, grid.cells, generator=draw) + 0.1 for _ in range(2))
    values = r[:, grid.offset_index] * a[:, None] * b[:, :, None]
    tables = fit(margins(values, grid), grid, rounds=300)
    found = predict(*tables, grid, _places(grid), frames).exp()
    assert torch.allclose(found, values, rtol=2e-2)


def test_sums_are_kept_by_the_fit() -> None:
    grid = CellGrid(3, 2, 2)
    values = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0))
    sums = margins(values, grid)
    assert float(sums.offset.sum()) == pytest.approx(float(values.sum()))
    again = margins(predict(*fit(sums, grid, 200), grid, _places(grid), 3).exp(), grid)
    for part in ("offset", "key", "query"):
        assert torch.allclose(getattr(again, part), getattr(sums, part), rtol=1e-3)
    both = sums.plus(sums)
    assert torch.allclose(both.key, 2 * sums.key)


def test_offsets_are_counted_by_frames_and_cells() -> None:
    grid = CellGrid(2, 1, 3)
    index = grid.offset_index
    assert index.shape == (6, 6)
    assert len(index.unique()) == 3 * 1 * 5
    assert index[0, 1] == index[1, 2] == index[3, 4]  # one column to the right, wherever
    assert index[0, 3] == index[2, 5] != index[3, 0]  # one frame on, not one back


def test_other_sizes() -> None:
    """Half a frame stays half a frame; a sink at the first frame stays there, one at the end moves with it."""
    grid = CellGrid(4, 2, 2)
    relative, key, query = torch.zeros(1, 7, 3, 3), torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    relative[0, 3, 1, 2] = 5.0  # same frame, same row, one column of two to the right
    key[0, 0], key[0, 3] = 7.0, -7.0
    wide = CellGrid(9, 1, 4)
    value = predict(relative, key, query, grid, _places(wide), 9)[0]
    middle = 4 * 4
    assert float(value[middle, middle + 2]) == pytest.approx(5.0)  # two columns of four
    assert float(value[middle, middle + 1]) == pytest.approx(2.5)  # between
    assert float(value[middle, 0]) == pytest.approx(7.0)
    assert float(value[middle, 8 * 4]) == pytest.approx(-7.0)
    assert float(value[middle, 3 * 4]) == pytest.approx(0.0)
    one = predict(*(t[..., :1, :1, :1] for t in (relative, key, query)), CellGrid(1, 1, 1), torch.tensor([[0.0, 0.5, 0.5]]), 1)
    assert one.shape == (1, 1, 1)


def test_sums_of_two_maps_are_those_of_their_sum() -> None:
    grid = CellGrid(2, 2, 3)
    first, second = torch.rand(2, 3, grid.cells, grid.cells, dtype=torch.float64)
    together, apart = margins(first + second, grid), margins(first, grid).plus(margins(second, grid))
    for name in ("offset", "key", "query"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name))
