"""The rules against slow loops: which tiles of a drawn map each keeps."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.selection.estimate import Estimate, mass_of
from genattn.selection.rules import ErrorAware, Rule, Threshold, TopK, TopP, heaviest, largest, rule_named

HEADS, ROWS, TILES, DIM = 2, 5, 9, 4


def _drawn(seed: int, shut: float = 0.2) -> Estimate:
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(2, HEADS, ROWS, DIM, generator=draw, dtype=torch.float64)
    key = torch.randn(2, HEADS, TILES, DIM, generator=draw, dtype=torch.float64)
    open = torch.rand(HEADS, ROWS, TILES, generator=draw) > shut
    open[..., 0] = True
    score = query @ key.transpose(-1, -2)
    variance = torch.rand(2, HEADS, TILES, DIM, generator=draw, dtype=torch.float64)
    return Estimate(query, key, score, mass_of(score, open, None), open, variance)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_top_k_keeps_the_heaviest_of_each_row(seed: int, share: float) -> None:
    found = _drawn(seed)
    kept = TopK(share).choose(found)
    for head in range(HEADS):
        for row in range(ROWS):
            open = found.open[head, row]
            order = sorted((-float(found.mass[head, row, j]), j) for j in range(TILES) if open[j])
            wanted = {j for _, j in order[: max(1, math.ceil(share * TILES))]}
            assert {j for j in range(TILES) if kept[head, row, j]} == wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_top_p_is_the_smallest_set_that_reaches_its_mass(seed: int, mass: float, reach: bool, least: float) -> None:
    found = _drawn(seed)
    kept = heaviest(found.mass, mass, least, reach)
    for row, chosen in zip(found.mass.flatten(0, 1), kept.flatten(0, 1)):
        order = row.argsort(descending=True).tolist()
        before, wanted = 0.0, set()
        for place, j in enumerate(order):
            goes_in = before <= mass if reach else before + float(row[j]) <= mass
            if goes_in or place < max(1, int(least * TILES)):
                wanted.add(j)
            before += float(row[j])
        assert {j for j in range(TILES) if chosen[j]} == wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1.0, 2.0))
def test_threshold_is_deviations_above_the_mean_of_the_open_tiles(seed: int, tau: float) -> None:
    found = _drawn(seed)
    kept = Threshold(tau).choose(found)
    for head in range(HEADS):
        for row in range(ROWS):
            open = [j for j in range(TILES) if found.open[head, row, j]]
            over = torch.zeros(TILES, dtype=torch.float64)
            for sample in range(2):
                s = found.score[sample, head, row]
                mean = sum(float(s[j]) for j in open) / len(open)
                variance = sum((float(s[j]) - mean) ** 2 for j in open) / len(open)
                over += (s - mean - tau * math.sqrt(variance + 1e-6 * math.log(2) ** 2)) / 2
            wanted = {j for j in open if over[j] > 0} | {max(open, key=lambda j: float(found.mass[head, row, j]))}
            assert {j for j in range(TILES) if kept[head, row, j]} == wanted


def test_error_aware_prefers_a_spread_tile_to_a_heavy_uniform_one() -> None:
    query = torch.ones(1, 1, 1, 1)
    score = torch.tensor([[[[3.0, 2.0, 0.0]]]])
    variance = torch.tensor([[[[0.0], [1.0], [1.0]]]])
    found = Estimate(
        query, score.transpose(-1, -2), score, mass_of(score, torch.ones(1, 1, 3) > 0, None), torch.ones(1, 1, 3) > 0
    )
    assert TopK(0.3).choose(found).flatten().tolist() == [True, False, False]
    spread = Estimate(found.query, found.key, found.score, found.mass, found.open, variance)
    assert ErrorAware(0.3).choose(spread).flatten().tolist() == [False, True, False]
    with pytest.raises(GenAttnError, match="needs the variance of the keys"):
        ErrorAware(0.3).choose(found)


def test_amounts_per_head_and_what_scaling_does() -> None:
    found = _drawn(1, shut=-1.0)
    kept = TopK((0.2, 0.9)).choose(found)
    assert kept.sum(-1).tolist() == [[2] * ROWS, [9] * ROWS]
    with pytest.raises(GenAttnError, match="one per head, got 3 amounts for 2 heads"):
        TopK((0.1, 0.2, 0.3)).choose(found)
    assert TopK((0.2, 0.9)).scaled(2.0) == TopK((0.4, 1.0))
    assert TopP(0.8).scaled(0.5) == TopP(0.4)
    assert Threshold(1.0).scaled(2.0) == Threshold(0.5)
    assert Threshold(-1.0).scaled(2.0) == Threshold(-2.0)
    assert ErrorAware(0.3).with_amount(0.4) == ErrorAware(0.4)
    more, less = (int(rule.choose(found).sum()) for rule in (Threshold(1.0).scaled(3.0), Threshold(1.0)))
    assert more > less


def test_nothing_open_gives_nothing() -> None:
    score = torch.zeros(1, 1, 1, 3)
    shut = torch.zeros(1, 1, 3, dtype=torch.bool)
    assert mass_of(score, shut, None).sum() == 0
    assert not largest(mass_of(score, shut, None), 0.5, shut).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TopK(0.0), "share must be a share of the key tiles in"),
        (lambda: TopK((0.5, 2.0)), "share must be a share of the key tiles in"),
        (lambda: ErrorAware(()), "share must be"),
        (lambda: TopP(1.2), "mass must be a share of the attention mass in"),
        (lambda: TopP(float("nan")), "mass must be"),
        (lambda: TopP(0.5, least=1.0), "least must be a share of the key tiles in"),
        (lambda: Threshold(float("inf")), "tau must be a number of standard deviations"),
        (lambda: Threshold(1.0, "full"), "variance must be one of exact, diag, got 'full'"),  # type: ignore[arg-type]
        (lambda: rule_named("topk"), "rule must be one of top-k, top-p, threshold, error-aware or a rule object, got 'topk'"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()  # type: ignore[operator]


def test_every_name_is_a_rule() -> None:
    for name in ("top-k", "top-p", "threshold", "error-aware"):
        assert isinstance(rule_named(name), Rule)
