"""The choice among measured settings, for any figures."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from genattn.apps.tuning.draw import draw_front
from genattn.apps.tuning.goal import Goal, Row, choose, front, hopeless, nearest_miss, parse_budget, still_running, summed
from genattn.errors import GenAttnError

PSNR = st.one_of(st.floats(5, 80), st.just(math.inf))
SPEED = st.floats(0.3, 5)
ORACLE = st.one_of(st.none(), st.floats(0, 1))


def row(name: str, speedup: float, psnr: float, oracle: float | None = None) -> Row:
    return Row(name, 1, 1 / speedup, speedup, 0.5, psnr, psnr, 0.9, oracle)


ROWS = st.lists(st.tuples(SPEED, PSNR, ORACLE), max_size=12).map(
    lambda many: [row(f"r{i}", *one) for i, one in enumerate(many)]
)
GOALS = st.builds(
    lambda kinds, budget, dB, oracle: Goal(*(v if kept else None for v, kept in zip((budget, dB, oracle), kinds))),
    st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)]),
    st.floats(1, 3),
    st.floats(0, 45),
    st.floats(0.01, 1),
)


@given(ROWS, GOALS)
def test_the_choice_reaches_the_goal_and_nothing_better_does(rows: list[Row], goal: Goal) -> None:
    def reaches(r: Row) -> bool:
        return (
            r.speedup > 1
            and (goal.budget is None or r.speedup >= goal.budget)
            and (goal.min_psnr is None or r.psnr >= goal.min_psnr)
            and (goal.min_oracle is None or (r.oracle is not None and r.oracle >= goal.min_oracle))
        )

    found, able = choose(rows, goal), [r for r in rows if reaches(r)]
    assert (found is None) == (not able)
    if found is not None:
        assert found in able
        if goal.min_psnr is None and goal.min_oracle is None:
            assert found.psnr == max(r.psnr for r in able)
        else:
            assert found.speedup == max(r.speedup for r in able)


@given(ROWS, GOALS, st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows: list[Row], goal: Goal, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(shuffled, goal) == choose(rows, goal)
    assert front(shuffled) == front(rows)


@given(ROWS)
def test_the_front_is_what_nothing_beats(rows: list[Row]) -> None:
    found = front(rows)
    assert [r.speedup for r in found] == sorted(r.speedup for r in found)
    for r in rows:
        beaten = any(o.speedup >= r.speedup and o.psnr >= r.psnr and (o.speedup, o.psnr) != (r.speedup, r.psnr) for o in rows)
        alike = [f for f in found if (f.speedup, f.psnr) == (r.speedup, r.psnr)]
        assert len(alike) == (not beaten)


@given(ROWS, GOALS)
def test_the_race_keeps_the_front_and_the_choice_of_speed_or_nearness(rows: list[Row], goal: Goal) -> None:
    kept = still_running(rows)
    assert all(r in kept for r in front(rows) if r.speedup >= 1)
    if goal.min_oracle is None:
        found = choose(front(rows), goal)
        assert found is None or (found in kept and not hopeless(found, goal))


def test_the_race_lets_go_of_what_is_clearly_beaten() -> None:
    good, near_tie, slow, beaten = row("good", 2, 30), row("tie", 1.95, 29.5), row("slow", 0.9, 60), row("beaten", 1.5, 28)
    assert still_running([good, near_tie, slow, beaten]) == [good, near_tie]
    judged = [row("quick", 2, 30, 0.5), row("keeps what was asked", 1.5, 28, 0.9)]
    assert still_running(judged) == judged


def test_what_skips_nothing_is_no_choice() -> None:
    same = Row("radial", 1, 1.0, 1.8, 1.0, 30.0, 30.0, 0.9)
    assert choose([same], Goal(budget=1.5)) is None
    assert still_running([same]) == []


def test_hopeless_is_far_from_the_goal() -> None:
    assert hopeless(row("a", 1.4, 50), Goal(budget=2))
    assert not hopeless(row("a", 1.6, 50), Goal(budget=2))
    assert hopeless(row("a", 3, 23), Goal(min_psnr=30))
    assert not hopeless(row("a", 3, 25), Goal(min_psnr=30))
    assert not hopeless(row("a", 1.1, 5), Goal(min_oracle=0.9))


def test_samples_become_rows() -> None:
    def sample(prompt: int, seconds: float, psnr: float, oracle: float | None) -> dict[str, object]:
        return {
            **{"setting": "a", "prompt": prompt, "seconds": seconds, "speedup": 6.0 / seconds, "density": 0.5},
            **{"psnr": psnr, "ssim": 0.5, "oracle": oracle, "peak_memory_gb": float(prompt)},
        }

    found = summed([sample(0, 2, 20, 0.5), sample(1, 3, 30, 1.0), sample(2, 6, 40, None)])
    assert found == [Row("a", 3, 11 / 3, 2.0, 0.5, 30.0, 20.0, 0.5, 0.75, 2.0)]
    assert row("a", 1, math.inf).to_dict()["psnr"] is None


def test_a_miss_says_what_came_nearest() -> None:
    rows = [row("quick", 1.8, 20), row("near", 1.2, 35)]
    said = nearest_miss(rows, Goal(budget=2, min_psnr=40))
    assert "no setting that is faster than dense reaches at least 2 times as fast and 40 dB" in said
    assert "quick (1.80 times, 20.0 dB)" in said
    assert "near (1.20 times, 35.0 dB)" in said
    assert "no setting is faster than dense at this size (the best is 0.50" in nearest_miss([row("a", 0.5, 30)], Goal(budget=2))


@pytest.mark.parametrize(("text", "value"), [("2x", 2.0), ("1.5", 1.5), (" 3 X ", 3.0), ("-2x", -2.0)])
def test_budgets_as_people_write_them(text: str, value: float) -> None:
    assert parse_budget(text) == value


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: parse_budget("fast"), "--budget must be a number of times as fast as dense, such as 2x, got 'fast'"),
        (lambda: Goal(), "tune needs a goal"),
        (lambda: Goal(budget=0.9), "at least 1x, got 0.9x"),
        (lambda: Goal(budget=math.inf), "at least 1x, got infx"),
        (lambda: Goal(min_psnr=-1), "--min-psnr must be a number of dB >= 0, got -1"),
        (lambda: Goal(min_psnr=math.nan), "--min-psnr must be a number of dB >= 0, got nan"),
        (lambda: Goal(min_oracle=0), "--min-oracle must be a share in"),
        (lambda: Goal(min_oracle=1.1), "--min-oracle must be a share in"),
    ],
)
def test_goals_that_are_refused(make: object, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(("goal", "expected"), [(Goal(budget=1.5), "near"), (Goal(min_psnr=20), "fast")])
def test_a_goal_of_speed_alone_takes_the_nearest_and_any_other_the_fastest(goal: Goal, expected: str) -> None:
    rows = [row("fast", 3.0, 25.0), row("near", 1.6, 40.0)]
    found = choose(rows, goal)
    assert found is not None
    assert found.name == expected


def test_a_front_of_nothing_and_one_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenAttnError, match="there is nothing to draw: no setting was measured"):
        draw_front([], None, Goal(budget=2.0), tmp_path / "front.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GenAttnError, match=r"the picture of a tuning run needs matplotlib; pip install 'genattn\[plots\]'"):
        draw_front([row("a", 2.0, 30.0)], None, Goal(budget=2.0), tmp_path / "front.png")
    assert not list(tmp_path.iterdir())
