"""Windows along one axis against the definition written out token by token."""

import itertools

import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.geometry.axis_window import AxisWindow


def _slow_mask(axis: AxisWindow) -> np.ndarray:
    """NATTEN's rule for one query at a time."""
    seen = np.zeros((axis.length, axis.length), dtype=bool)
    for query in range(axis.length):
        g, j = query % axis.dilation, query // axis.dilation
        size = -(-(axis.length - g) // axis.dilation)
        start = (j // axis.stride) * axis.stride
        if axis.causal:
            leader = min(start + axis.stride - 1, size - 1)
            keys = range(max(leader - axis.window + 1, 0), j + 1)
        else:
            leader = min(start + axis.stride // 2, size - 1)
            low = leader - axis.window // 2
            low = low if axis.circular else min(max(low, 0), size - axis.window)
            keys = range(low, low + axis.window)
        for key in keys:
            seen[query, g + axis.dilation * (key % size)] = True
    return seen


def _settings(longest: int) -> list[AxisWindow]:
    cases = []
    for length, dilation in itertools.product(range(1, longest + 1), (1, 2, 3)):
        for window in range(1, length // dilation + 1):
            for stride in range(1, window + 1):
                cases += [AxisWindow("width", length, window, stride, dilation, causal) for causal in (False, True)]
                if length % dilation == 0:
                    cases.append(AxisWindow("width", length, window, stride, dilation, circular=True))
    return cases


def test_every_small_axis_is_the_definition() -> None:
    for axis in _settings(14):
        assert np.array_equal(axis.mask(), _slow_mask(axis)), axis


def test_inverse_is_the_transpose() -> None:
    """The closed form names exactly the queries that see each key: one run of the key's dilation group."""
    for axis in _settings(17):
        if axis.circular:
            continue
        first, end = axis.inverse()
        group, place = np.arange(axis.length) % axis.dilation, np.arange(axis.length) // axis.dilation
        inside = (place[:, None] >= first[None]) & (place[:, None] < end[None]) & (group[:, None] == group[None])
        assert np.array_equal(inside, axis.mask()), axis


def test_no_query_without_keys_and_every_query_sees_itself() -> None:
    for axis in _settings(14):
        assert axis.mask().diagonal().all(), axis
        if not axis.causal:
            assert (axis.mask().sum(1) == axis.window).all(), axis


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window_size must be >= 1 on the width axis of 10, got 0; use -1 for the full axis"),
        ({"window": 11}, "nearest legal window_size: 10"),
        ({"window": 4, "dilation": 3}, "got 4 * 3; nearest legal window_size: 3"),
        ({"window": 4, "stride": 5}, "stride must be between 1 and window_size = 4"),
        ({"window": 4, "stride": 0}, "nearest legal value: 1"),
        ({"window": 1, "dilation": 0}, "dilation must be >= 1"),
        ({"window": 1, "dilation": 11}, "dilation must be <= 10"),
        ({"window": 3, "causal": True, "circular": True}, "cannot be causal"),
        ({"window": 3, "dilation": 3, "circular": True}, "nearest legal dilation: 2"),
    ],
)
def test_bad_settings(settings: dict[str, int], says: str) -> None:
    with pytest.raises(GenAttnError) as error:
        AxisWindow("width", 10, **settings)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_no_inverse_on_a_circle() -> None:
    with pytest.raises(GenAttnError, match="transposed"):
        AxisWindow("width", 10, 3, circular=True).inverse()
