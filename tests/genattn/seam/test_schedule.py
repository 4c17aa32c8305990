"""When a pattern acts."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from genattn import GenAttnError, Schedule
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import Run


def site(depth: int = 5) -> AttentionSite:
    return AttentionSite(f"blocks.{depth}.attn1", "blocks", depth, depth, "self", 2)


def why(schedule: Schedule, run: Run, depth: int = 5, tokens: int = 1000, blocks: int = 10) -> str | None:
    return schedule.why_dense(run, site(depth), tokens, blocks)


def test_default_is_never_without_dense_steps_and_layers() -> None:
    for steps in range(1, 60):
        assert why(Schedule(), Run(step=0, num_steps=steps)) is not None
    assert why(Schedule(), Run(step=30, num_steps=40), depth=0) == "dense layer (dense_layers=1)"
    assert why(Schedule(), Run(step=30, num_steps=40), depth=1) is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_shares_of_the_run(first: float, last: float, steps: int) -> None:
    schedule = Schedule(dense_steps=first, dense_last_steps=last, dense_layers=0)
    dense = [why(schedule, Run(step=i, num_steps=steps)) is not None for i in range(steps)]
    head, tail = math.ceil(first * steps - 1e-9), math.ceil(last * steps - 1e-9)
    assert dense == [i < head or i >= steps - tail for i in range(steps)]


def test_counts_of_steps_need_no_total() -> None:
    schedule = Schedule(dense_steps=2, dense_layers=0)
    assert [why(schedule, Run(step=i)) is None for i in range(4)] == [False, False, True, True]
    assert "num_steps" in (why(Schedule(dense_steps=2, dense_last_steps=1), Run(step=3)) or "")
    assert "num_steps" in (why(Schedule(dense_steps=0.5), Run(step=3)) or "")
    assert "outside a forward" in (why(schedule, Run()) or "")
    assert why(Schedule(dense_steps=0, dense_layers=0), Run()) is None


def test_one_means_a_step_and_one_point_zero_the_whole_run() -> None:
    assert why(Schedule(dense_steps=1, dense_layers=0), Run(step=1, num_steps=9)) is None
    assert why(Schedule(dense_steps=1.0, dense_layers=0), Run(step=8, num_steps=9)) is not None


def test_layers() -> None:
    run = Run(step=9, num_steps=10)
    picked = Schedule(dense_layers=[0, 4], dense_last_layers=2)  # type: ignore[arg-type]
    assert [d for d in range(10) if why(picked, run, depth=d) is not None] == [0, 4, 8, 9]
    assert why(Schedule(min_tokens=1001), run) == "short sequence (min_tokens=1001)"
    assert why(Schedule(min_tokens=1000), run) is None


def test_noise_window_and_passes() -> None:
    window = Schedule(dense_steps=0, sigma=(0.2, 0.8))
    assert [why(window, Run(step=1, sigma=s)) is None for s in (0.1, 0.2, 0.5, 0.8, 0.9)] == [False, True, True, True, False]
    assert "noise level is unknown" in (why(window, Run(step=1)) or "")
    cond = Schedule(dense_steps=0, passes="cond")  # type: ignore[arg-type]
    assert why(cond, Run(step=1, pass_name="cond")) is None
    assert "'uncond'" in (why(cond, Run(step=1, pass_name="uncond")) or "")
    assert "None" in (why(cond, Run(step=1)) or "")


def test_options_change_only_what_they_name() -> None:
    schedule = Schedule(dense_steps=3).with_options({"dense_layers": 4, "num_steps": 7})
    assert schedule == Schedule(dense_steps=3, dense_layers=4)
    assert schedule.with_options({}) is schedule


@pytest.mark.parametrize(
    "settings",
    [
        {"dense_steps": 1.5},
        {"dense_steps": -1},
        {"dense_steps": math.nan},
        {"dense_steps": "half"},
        {"dense_steps": True},
        {"dense_last_steps": -0.1},
        {"dense_layers": -1},
        {"dense_layers": (1, -2)},
        {"dense_layers": True},
        {"dense_last_layers": -1},
        {"sigma": (0.8, 0.2)},
        {"sigma": (1.0,)},
        {"min_tokens": -5},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(GenAttnError, match=r"must be .*got"):
        Schedule(**settings)  # type: ignore[arg-type]


def test_a_run_is_told_and_compared_without_what_it_carries() -> None:
    """Models, pipelines and tensors would flood a log, and two steps are one step whatever was noted in them."""
    plain, full = (
        Run(step=1),
        Run(step=1, model=torch.nn.Linear(1, 1), pipe="p" * 99, scoped={1: {"a": 1}}, notes={7: "x" * 99}),
    )
    assert repr(full) == repr(plain)
    assert full == plain
    assert full != Run(step=2)
