"""The search, on worlds where the right answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.search import HeadSearch, SearchSettings, Trial, bootstrap_interval, rank_correlation

POOL = [(layer, head) for layer in range(3) for head in range(4)]


class World:
    """Heads are worth fixed amounts; prompts and the probe add noise that the trial alone decides."""

    def __init__(self, worth: dict, noise: float = 0.0, probe_noise: float = 0.0, synergy: dict | None = None) -> None:
        self.worth, self.noise, self.probe_noise, self.synergy = worth, noise, probe_noise, synergy or {}
        self.asked: list[Trial] = []

    def __call__(self, trials: list[Trial]) -> list[dict[str, float]]:
        self.asked += trials
        return [self.score(t) for t in trials]

    def score(self, trial: Trial) -> dict[str, float]:
        rng = np.random.default_rng([trial.prompt, *(10 * a + b for a, b in trial.heads), 7])
        value = sum(self.worth.get(h, 0.0) for h in trial.heads)
        value += sum(gain for pair, gain in self.synergy.items() if set(pair) <= set(trial.heads))
        value *= 1.0 if trial.u is None else 4 * trial.u * (1 - trial.u)
        noise = self.probe_noise if trial.kind == "probe" else self.noise
        return {"good": value + trial.prompt + noise * rng.normal(), "cost": -float(len(trial.heads))}


def search(world: World, **changes: object) -> tuple[HeadSearch, object]:
    base = {"objectives": {"good": 1.0}, "prompts": 4, "rounds": 2, "top_k": 2}
    found = HeadSearch(SearchSettings(**{**base, **changes}), POOL, world)
    return found, found.run()


@given(st.permutations(range(12)))
@settings(max_examples=20, deadline=None)
def test_finds_the_best_heads(order: list[int]) -> None:
    world = World(dict(zip(POOL, map(float, order))))
    _, result = search(world)
    best = sorted(POOL, key=lambda h: -world.worth[h])
    assert list(result.heads) == best[:4]
    assert [r.added for r in result.rounds] == [tuple(best[:2]), tuple(best[2:4])]
    assert len(world.asked) == len(set(world.asked))


def test_composition_beats_single_worth() -> None:
    world = World({(0, 0): 3.0, (1, 1): 2.0}, synergy={((0, 0), (2, 2)): 5.0})
    _, result = search(world, rounds=2, top_k=1)
    assert result.heads == ((0, 0), (2, 2))


def test_scores_are_z_scores_against_the_unguided() -> None:
    _, result = search(World({(0, 0): 3.0}), rounds=1, top_k=1)
    assert result.rounds[0].scores[(0, 0)] == pytest.approx(3.0 / np.std([0, 1, 2, 3], ddof=1))
    assert result.baseline["good"] == 1.5
    assert result.rounds[0].means["good"] == 4.5


def test_objectives_are_weighed_and_floored() -> None:
    world = World({(0, 0): 3.0, (0, 1): 1.0})
    _, result = search(world, objectives={"good": 1.0, "cost": 1.0}, rounds=1, top_k=1, floors={"cost": -1.0})
    assert result.heads == ((0, 0),)
    assert result.rounds[0].scores[(0, 0)] == pytest.approx(3.0 / np.std([0, 1, 2, 3], ddof=1) - 1.0)
    _, result = search(world, objectives={"good": 1.0, "cost": 1.0}, floors={"cost": -1.0}, top_k=1, rounds=3)
    assert result.stopped == "no head left above the floors"
    assert len(result.heads) == 1
    _, result = search(world, floors={"good": 4.0}, rounds=1, top_k=2)
    assert result.heads == ((0, 0),)
    assert result.rounds[0].scores[(1, 1)] is None


def test_halving_spends_less_and_keeps_the_best() -> None:
    worth = dict(zip(POOL, range(12)))
    full, halved = World(worth, noise=0.1), World(worth, noise=0.1)
    _, a = search(full, prompts=8, rounds=1)
    _, b = search(halved, prompts=8, rounds=1, halving=2)
    assert a.heads == b.heads
    assert len(halved.asked) < 0.6 * len(full.asked)
    assert SearchSettings({"good": 1.0}, 8, halving=2, top_k=2).rungs(12) == [(2, 6), (4, 3), (8, 2)]


def test_probe_chooses_who_gets_the_full_check() -> None:
    worth = dict(zip(POOL, range(12)))
    world = World(worth, probe_noise=1.0)
    _, result = search(world, probe_keep=6, rounds=1)
    assert result.heads == tuple(POOL[:-3:-1])
    assert sum(t.kind == "full" and len(t.heads) == 1 for t in world.asked) == 6 * 4
    trusting = World(worth)
    _, result = search(trusting, probe_keep=0, rounds=1)
    assert result.heads == tuple(POOL[:-3:-1])
    assert not any(t.kind == "full" and len(t.heads) == 1 for t in trusting.asked)


def test_the_probe_of_later_rounds_looks_from_the_heads_chosen_so_far() -> None:
    world = World(dict(zip(POOL, range(12))))
    _, result = search(world, probe_keep=4, rounds=3, top_k=1)
    chosen = [added for done in result.rounds for added in done.added]
    bases = {len(t.base): tuple(sorted(t.base)) for t in world.asked if t.kind == "probe" and t.heads}
    assert bases == {count: tuple(sorted(chosen[:count])) for count in range(3)}
    assert all(set(t.base) < set(t.heads) for t in world.asked if t.kind == "probe" and t.heads)
    assert {t.base for t in world.asked if t.kind == "full"} == {()}


def test_unguided_pictures_are_made_once_for_all_rounds_and_strengths() -> None:
    world = World(dict(zip(POOL, range(12))))
    _, result = search(world, probe_keep=4, rounds=3, top_k=1, u_grid=(0.25, 0.5), held_out=2)
    assert len(result.rounds) == 3
    unguided = [t for t in world.asked if not t.heads]
    wanted = [Trial((), prompt, "probe") for prompt in range(4)] + [Trial((), prompt, "full") for prompt in range(6)]
    assert sorted(unguided, key=lambda t: t.key) == sorted(wanted, key=lambda t: t.key)
    assert len(set(world.asked)) == len(world.asked)


def test_the_set_that_was_chosen_is_tried_at_each_strength_and_judged_at_the_best() -> None:
    class InOneGo(World):
        """Several processes share what is asked in one go."""

        def __call__(self, trials: list[Trial]) -> list[dict[str, float]]:
            requests.append([(t.u, t.prompt) for t in trials])
            return super().__call__(trials)

    requests: list[list[tuple[float | None, int]]] = []
    world = InOneGo(dict(zip(POOL, range(12))))
    _, result = search(world, rounds=1, u_grid=(0.25, 0.5), held_out=2)
    assert [(u, prompt) for u in (0.25, 0.5) for prompt in range(4)] in requests
    final = tuple(sorted(result.heads))
    at = {u: sorted(t.prompt for t in world.asked if t.heads == final and t.u == u) for u in (None, 0.25, 0.5)}
    assert at == {None: [0, 1, 2, 3], 0.25: [0, 1, 2, 3], 0.5: [0, 1, 2, 3, 4, 5]}
    assert {t.heads for t in world.asked if t.u is not None} == {final}


def test_keeps_the_best_round_and_stops_when_nothing_is_gained() -> None:
    worth = dict.fromkeys(POOL, -1.0) | {(0, 0): 5.0, (0, 1): 4.0}
    _, result = search(World(worth), rounds=5, patience=2)
    assert result.heads == ((0, 0), (0, 1))
    assert len(result.rounds) == 3
    assert result.stopped == "2 rounds without gain"
    _, result = search(World(worth), rounds=9)
    assert result.stopped == "only 0 heads left in the pool"


def test_returns_all_rounds_as_published_when_asked() -> None:
    """Algorithm 1 returns what R rounds added, also where the last of them cost score."""
    worth = dict.fromkeys(POOL, -1.0) | {(0, 0): 5.0, (0, 1): 4.0}
    _, best = search(World(worth), rounds=3)
    _, everything = search(World(worth), rounds=3, returned="all")
    assert [r.added for r in best.rounds] == [r.added for r in everything.rounds]
    assert best.heads == ((0, 0), (0, 1))
    assert everything.heads == tuple(head for r in everything.rounds for head in r.added)
    assert len(everything.heads) == 6
    with pytest.raises(GenAttnError, match="returned must be 'best' or 'all', got 'prefix'"):
        search(World(worth), returned="prefix")


def test_tunes_u_and_checks_held_out_prompts() -> None:
    world = World({(0, 0): 5.0}, noise=0.05)
    _, result = search(world, u_grid=(0.1, 0.5, 1.0), held_out=6, rounds=1, top_k=1)
    assert result.u == 0.5
    checked = {t.prompt for t in world.asked if t.prompt >= 4}
    assert checked == set(range(4, 10))
    assert result.held_out.low["good"] <= result.held_out.gain["good"] <= result.held_out.high["good"]
    assert result.held_out.gain["good"] == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize("changes", [{}, {"halving": 2, "prompts": 8}, {"probe_keep": 5}, {"u_grid": (0.5,), "held_out": 3}])
def test_the_announced_cost_is_an_upper_bound(changes: dict) -> None:
    world = World(dict(zip(POOL, range(12))))
    found, _ = search(world, **changes)
    announced = found.settings.trials(len(POOL))
    for kind in ("full", "probe"):
        spent = sum(t.kind == kind for t in world.asked)
        assert 0.7 * announced[kind] <= spent <= announced[kind]


def test_statistics() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [3, 3, 9]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    low, high = bootstrap_interval(np.random.default_rng(0).normal(2.0, 1.0, 400))
    assert low < 2.0 < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {}}, "finite weights"),
        ({"objectives": {"good": 0.0}}, "finite weights"),
        ({"prompts": 0}, "prompts must be >= 1"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"top_k": 13}, "at least top_k=13 heads, got 12"),
        ({"held_out": -1}, "must be >= 0"),
        ({"floors": {"x": 1.0}}, "a floor needs an objective"),
        ({"u_grid": (2.0,)}, "u_grid"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        search(World({}), **changes)


def test_refuses_bad_scores() -> None:
    with pytest.raises(GenAttnError, match=r"finite score, got none for \['good'\] in full/0/none"):
        search(lambda trials: [{"good": math.nan} for _ in trials])
    with pytest.raises(GenAttnError, match="every trial must get its scores, got 1 for"):
        search(lambda trials: [{"good": 1.0}])
