"""The search over launch settings, on a clock that is made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genattn.apps.bench import autotune as module
from genattn.apps.bench.autotune import autotune, autotune_here, keep, summed, tuning_cases
from genattn.apps.bench.cases import AttentionCase
from genattn.apps.cli.kernels import autotune_command
from genattn.errors import GenAttnError
from genattn.kernels.triton.config import launch_of, measured_table, settings_of
from genattn.patterns.radial import RadialPattern


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENATTN_CACHE", str(tmp_path))
    settings_of.cache_clear()
    yield
    settings_of.cache_clear()


def _away_from(best: tuple[int, ...]):
    return lambda kernel, setting: 1.0 + sum(abs(a - b) for a, b in zip(setting, best))


def test_the_fastest_setting_is_found_kept_and_used(tmp_path: Path) -> None:
    shipped = launch_of("forward", "sm_90", 128, 128, 128)
    entry = autotune("sm_90", 128, _away_from((4, 3, 2, 4)), ("forward",), lambda line: None)
    assert entry == {"forward": [4, 3, 2, 4]} != {"forward": [shipped.warps, shipped.stages, shipped.split, shipped.fine]}
    path = keep("sm_90", 128, entry)
    keep("sm_90", 128, {"dq": [4, 1, 1, 1]})
    assert path.parent == tmp_path
    assert json.loads(path.read_text()) == {"128": {"forward": [4, 3, 2, 4], "dq": [4, 1, 1, 1]}}
    used = launch_of("forward", "sm_90", 128, 128, 128)
    assert (used.warps, used.stages, used.split, used.fine) == (4, 3, 2, 4)
    assert launch_of("dkv", "sm_90", 128, 128, 128).warps == 8, "the rest stays as shipped"


def test_programs_that_share_out_tiles_are_a_candidate_of_the_forward_kernel_alone() -> None:
    asked: dict[str, set[int]] = {"forward": set(), "dq": set()}

    def timer(kernel: str, setting: tuple[int, ...]) -> float:
        asked[kernel].add(len(setting))
        return 1.0 - 0.1 * (setting[4] == 2 if len(setting) > 4 else 0)

    entry = autotune("sm_90", 128, timer, ("forward", "dq"), lambda line: None)
    assert entry == {"forward": [*settings_of("sm_90")["128"]["forward"], 2]}
    assert asked == {"forward": {5}, "dq": {4}}
    keep("sm_90", 128, entry)
    assert launch_of("forward", "sm_90", 128, 128, 128).persistent == 2


def test_noise_changes_nothing() -> None:
    start = tuple(settings_of("sm_90")["64"]["forward"])
    assert autotune("sm_90", 64, lambda k, s: 1.0 if s == start else 0.99, ("forward",), lambda line: None) == {}


def test_settings_that_cannot_run_are_passed_over() -> None:
    lines: list[str] = []

    def timer(kernel: str, setting: tuple[int, ...]) -> float:
        if setting[1] > 2:
            raise RuntimeError("out of resource: shared memory")
        return _away_from((8, 4, 1, 1))(kernel, setting)

    assert autotune("sm_90", 64, timer, ("forward",), lines.append)["forward"] == [8, 2, 1, 1]
    assert any("shared memory" in line for line in lines)


def test_a_shipped_setting_that_cannot_run_is_told() -> None:
    def broken(kernel: str, setting: tuple[int, ...]) -> float:
        raise RuntimeError("no")

    with pytest.raises(GenAttnError, match="must run with its shipped setting .* or a neighbour"):
        autotune("sm_90", 64, broken, ("dq",), lambda line: None)


def test_a_shipped_setting_that_a_chip_cannot_hold_is_replaced() -> None:
    shipped = tuple(settings_of("sm_90")["64"]["dq"])

    def timer(kernel: str, setting: tuple[int, ...]) -> float:
        if setting == shipped:
            raise RuntimeError("")
        return 1.0 + setting[1]

    lines: list[str] = []
    entry = autotune("sm_90", 64, timer, ("dq",), lines.append)
    assert entry["dq"] != list(shipped)
    assert any("no message" in line for line in lines)


def test_the_search_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.apps.bench import autotune as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    asked: dict[str, int] = {}

    def timer(kernel: str, setting: tuple[int, ...]) -> float:
        now[0] += 10.0
        asked[kernel] = asked.get(kernel, 0) + 1
        return 1.0 / now[0]

    autotune("sm_90", 64, timer, ("forward", "dq"), lambda line: None, until=100.0)
    assert now[0] <= 110.0
    assert asked["dq"] >= 4, "the second kernel has its share"


def test_a_setting_must_serve_every_case() -> None:
    def refuses(kernel: str, setting: tuple[int, ...]) -> float:
        raise RuntimeError("shared memory")

    timer = summed([lambda kernel, setting: 1.0, lambda kernel, setting: 2.0])
    assert timer("dq", (8, 2, 1, 2)) == 3.0
    with pytest.raises(RuntimeError, match="shared memory"):
        summed([timer, refuses])("dq", (8, 2, 1, 2))
    kinds = {type(case.pattern).__name__ for case in tuning_cases(64)}
    assert kinds == {"RadialPattern", "NeighborhoodPattern"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: it would be tuned")
def test_no_gpu_is_one_clear_line() -> None:
    with pytest.raises(GenAttnError, match="autotune needs a GPU"):
        autotune_here()


def test_the_command_refuses_before_work() -> None:
    with pytest.raises(GenAttnError, match=r"--head-dim must lie in \[1, 256\], got 300"):
        autotune_command(head_dim=[300])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100000,
        '{"512": {}}',
        '{"128": []}',
        '{"128": {"forward": [8, 3, 2]}}',
        '{"128": {"other": [8, 3, 2, 4]}}',
        '{"128": {"dq": [3, 3, 2, 4]}}',
        '{"128": {"dq": [8, 3, 2, 4.0]}}',
        '{"128": {"dq": [8, 3, true, 4]}}',
        '{"128": {"dq": [8, 3, 2, 4, 1]}}',
        '{"128": {"forward": [8, 99, 2, 4]}}',
        '{"128": {"dq": [0, 3, 2, 4]}}',
    ],
)
def test_a_damaged_table_is_told_and_the_shipped_one_serves(content: str) -> None:
    shipped = launch_of("forward", "sm_90", 128, 128, 128)
    path = measured_table("sm_90")
    path.write_text(content)
    settings_of.cache_clear()
    with pytest.warns(UserWarning, match="cannot be used .* run `genattn bench autotune`, or delete it"):
        assert launch_of("forward", "sm_90", 128, 128, 128) == shipped
    with pytest.warns(UserWarning, match="cannot be used"):
        keep("sm_90", 128, {"dq": [4, 1, 1, 1]})
    assert json.loads(path.read_text()) == {"128": {"dq": [4, 1, 1, 1]}}, "and is written anew"


CASE = AttentionCase("toy", (2, 8, 8), RadialPattern(), 5, 2, 16, torch.float32)
RESULTS = {"forward": ("OUT",), "dq": ("DQ",), "dkv": ("DK", "DV")}


@pytest.mark.parametrize("kernel", RESULTS)
def test_each_setting_is_launched_and_its_result_compared(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []
    gives = [1.0]

    def launch(jitted: Any, grid: Any, call: dict[str, Any], query: torch.Tensor) -> None:
        launched.append((call["num_warps"], call["num_stages"]))
        if call["num_stages"] == 4:
            raise RuntimeError
        for name in RESULTS[kernel]:
            call[name].fill_(gives[0])

    monkeypatch.setattr(module, "launch", launch)
    timer = module.gpu_timer(CASE, 2, "cpu")
    assert timer(kernel, (4, 2, 1, 1)) > 0
    gives[0] = 1.005  # rounding
    assert timer(kernel, (8, 2, 1, 1)) > 0
    assert launched == [(4, 2)] * 4 + [(8, 2)] * 4, "one to compile and compare, one to warm up, then two rounds"
    gives[0] = 1.02
    with pytest.raises(RuntimeError, match="another result than the shipped setting's"):
        timer(kernel, (8, 2, 1, 1))
    with pytest.raises(RuntimeError, match="^RuntimeError$"):  # an error without a word of its own
        timer(kernel, (8, 4, 1, 1))
