"""Shares spread where they help most, and factors along the run."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.selection.budget import Budget, spread_shares

SHARES = (0.1, 0.2, 0.4, 0.8)


def _error(curves: torch.Tensor, chosen: list[int]) -> float:
    return sum(float(curves[h, i]) for h, i in enumerate(chosen))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.8))
def test_no_choice_of_measured_points_does_better(seed: int, target: float) -> None:
    """Against every combination, on convex curves, read between the points along straight lines."""
    draw = torch.Generator().manual_seed(seed)
    slopes = torch.rand(4, len(SHARES) - 1, generator=draw, dtype=torch.float64).sort(dim=1, descending=True).values
    steps = slopes * torch.tensor([b - a for a, b in itertools.pairwise(SHARES)], dtype=torch.float64)
    curves = torch.cat([torch.zeros(4, 1, dtype=torch.float64), -steps.cumsum(1)], dim=1)
    shares = spread_shares(curves[None], SHARES, target)[0]
    known = torch.tensor(SHARES, dtype=torch.float64)
    error = 0.0
    for head in range(4):
        right = int(torch.searchsorted(known, shares[head]).clamp(1, 3))
        part = (shares[head] - known[right - 1]) / (known[right] - known[right - 1])
        error += float(curves[head, right - 1] + part * (curves[head, right] - curves[head, right - 1]))
    best = min(
        _error(curves, list(c))
        for c in itertools.product(range(4), repeat=4)
        if sum(SHARES[i] for i in c) / 4 <= target + 1e-12
    )
    assert error <= best + 1e-9
    assert float(shares.mean()) == pytest.approx(target)


def test_the_share_goes_to_the_head_that_gains() -> None:
    curves = torch.tensor([[[1.0, 0.1, 0.0, 0.0], [0.01, 0.009, 0.0, 0.0]]])
    shares = spread_shares(curves, SHARES, 0.15)
    assert shares.tolist() == [[pytest.approx(0.2), pytest.approx(0.1)]]
    flat = spread_shares(torch.zeros(1, 2, 4), SHARES, 0.5)
    assert flat.tolist() == [[0.1, 0.1]]  # nothing to gain: the mean stays below


def test_a_dent_above_the_hull_is_jumped_over() -> None:
    curves = torch.tensor([[[1.0, 0.99, 0.0, 0.0]]])
    assert float(spread_shares(curves, SHARES, 0.4)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("errors", "shares", "target", "says"),
    [
        (torch.zeros(2, 3), SHARES, 0.3, r"errors must be \[layers, heads, 4\]"),
        (torch.zeros(1, 1, 4), (0.4, 0.2, 0.1, 0.8), 0.3, "for rising shares"),
        (torch.full((1, 1, 4), float("nan")), SHARES, 0.3, "errors must be finite"),
        (torch.zeros(1, 1, 4), SHARES, 0.05, "target must be between the smallest share 0.1 and 1, got 0.05"),
    ],
)
def test_spread_refusals(errors: torch.Tensor, shares: tuple[float, ...], target: float, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        spread_shares(errors, shares, target)


def test_parts_of_the_run() -> None:
    budget = Budget(steps=((0.25, 2.0), (0.9, 1.0), (1.0, 1.5)))
    assert [budget.factor(f) for f in (0.0, 0.2, 0.25, 0.89, 0.95, None)] == [2.0, 2.0, 1.0, 1.0, 1.5, 1.0]
    assert Budget(steps=((0.5, 3.0),)).factor(0.7) == 1.0
    assert Budget((0.2, (0.1, 0.3))).of_layer(1, 2) == (0.1, 0.3)
    assert Budget().of_layer(5, 9) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Budget(steps=((0.9, 1.0), (0.5, 1.0))), "steps must end in rising order"),
        (lambda: Budget(steps=((0.0, 1.0),)), "steps must end in rising order"),
        (lambda: Budget(steps=((0.5, 0.0),)), "factors of steps must be > 0"),
        (lambda: Budget((0.1, 0.2)).of_layer(0, 3), "one amount per layer, got 2 amounts for layer 0 of 3"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()  # type: ignore[operator]
