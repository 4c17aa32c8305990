"""Which queries of the path without a compiler are served together: the estimated cost against its words, in plain loops."""

import pytest
import torch

from genattn.kernels.cpu import groups


def run_of(queries: int, keys: set[int]) -> groups._Run:
    return groups._Run(torch.arange(queries), torch.tensor(sorted(keys)), len(keys), torch.empty(0, 0, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_serving_neighbours_together(seed: int) -> None:
    """Keys that all of them see are read once for all, and their answers joined; the rest is each one's own."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 300, (6,), generator=generator).tolist()
    seen = torch.rand(6, 40, generator=generator) < 0.7
    keys = [set(torch.nonzero(row).flatten().tolist()) for row in seen]
    found = groups._shared_costs([run_of(*each) for each in zip(numbers, keys)], seen)
    per_key = groups._ROWS_OF_KEY
    assert [len(row) for row in found] == [6, 5, 4, 3, 2, 1]
    for first in range(6):
        assert found[0][first] == (numbers[first] + per_key) * len(keys[first])
    for length in range(2, 7):
        for first in range(7 - length):
            some = range(first, first + length)
            both, served = len(set.intersection(*(keys[i] for i in some))), sum(numbers[i] for i in some)
            own = sum((numbers[i] + per_key) * (len(keys[i]) - both) for i in some)
            joined = (served + per_key) * both + groups._JOIN * served + length * groups._CALL
            wanted = float("inf") if served > groups._MOST_QUERIES else own + joined
            assert found[length - 1][first] == pytest.approx(wanted)


def cuts(count: int) -> list[list[tuple[int, int]]]:
    """Every way to cut a sequence."""
    if not count:
        return [[]]
    return [[*head, (first, count)] for first in range(count) for head in cuts(first)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 3, 7])
def test_the_cheapest_cut_of_all(seed: int, longest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(7 - n, generator=generator).tolist() for n in range(longest)]
    known = [cut for cut in cuts(7) if all(last - first <= longest for first, last in cut)]
    best = min(known, key=lambda cut: sum(costs[last - first - 1][first] for first, last in cut))
    cost, segments = groups._cheapest(costs)
    assert segments == best
    assert cost == pytest.approx(sum(costs[last - first - 1][first] for first, last in best))


def test_the_cost_of_a_run() -> None:
    """Every query meets every key of the union; a key that not all of them see is masked; a call has its overhead."""
    rows, union, shared = torch.tensor([10, 600]), torch.tensor([50, 50]), torch.tensor([30, 30])
    wanted = [(r + groups._ROWS_OF_KEY) * 50 + groups._MASKED * r * 20 + groups._CALL for r in (10, 600)]
    assert groups._cost(rows, union, shared, 1).tolist() == pytest.approx(wanted)
    assert groups._cost(rows, union, shared, 2).tolist() == pytest.approx([wanted[0], float("inf")])


def test_units_follow_the_one_that_shares_the_most_keys() -> None:
    some = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    assert groups._chain(some) == [0, 2, 3, 1]  # 2/3 alike, then 2/4, then 2/3
