"""The GPU benchmark on the CPU, at toy sizes and through the same code: rows at once, each case alone."""

import csv
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.apps.bench import denoising_step, gpu_check, lease, timing
from genattn.apps.bench.cases import AttentionCase, lease_cases, toy_cases
from genattn.apps.bench.denoising_step import HUNYUAN, WAN_14B, StepShape
from genattn.apps.bench.gpu import DeviceLost, forward_jobs, jobs_of, main, option_jobs, run_jobs, step_jobs
from genattn.apps.bench.gpu_check import Check, check_row, checks
from genattn.apps.bench.gpu_compile import SETTINGS, launch_of_spec, specs
from genattn.apps.bench.gpu_rows import backward_rows, full_tile_rows, option_rows, setting_rows
from genattn.apps.bench.timing import interleaved, timed
from genattn.apps.bench.verdict import write_verdict
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.presets import PRESETS

ROOT = Path(__file__).resolve().parents[3]
TOY = AttentionCase("toy", (5, 8, 8), RadialPattern(), 5, 2, 16, torch.float32)
FACTS = {"device": "CPU"}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _later() -> float:
    return time.monotonic() + 600


def test_forward_and_backward_rows(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    masked = AttentionCase("masked", TOY.grid, TOY.pattern, 5, 2, 16, torch.float32, hidden=3)
    assert run_jobs(forward_jobs([TOY, masked], 1, "cpu", "grouped"), table, FACTS, _later()) == []
    row, other = _rows(table)
    assert "sdpa:flash" in row["dense_times"]
    assert float(row["ratio"]) > 0
    assert other["dense_times"] == row["dense_times"], "dense is measured once per shape"
    assert other["correct"] == "True"
    run_jobs([("toy", lambda: backward_rows(TOY, 1, "cpu", "grouped"))], tmp_path / "back.csv", FACTS, _later())
    assert float(_rows(tmp_path / "back.csv")[0]["backward_ratio"]) > 0


def test_what_no_backend_serves_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.apps.bench import attention

    monkeypatch.setattr(attention, "interleaved", lambda *_: pytest.fail("timed for nothing"))
    jobs = forward_jobs([TOY], 1, "cpu", "triton-int8")
    monkeypatch.setattr("genattn.apps.bench.gpu.matmul_flops", lambda *_: 1.0)
    assert run_jobs(jobs, tmp_path / "rows.csv", FACTS, _later()) == []
    assert not (tmp_path / "rows.csv").exists()


def test_a_backend_that_fails_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        pass

    def broken(*args, **kwargs):
        raise Odd

    monkeypatch.setattr("genattn.apps.bench.attention.block_sparse_attention", broken)
    run_jobs(forward_jobs([TOY], 1, "cpu", "grouped"), tmp_path / "rows.csv", FACTS, _later())
    (row,) = _rows(tmp_path / "rows.csv")
    assert row["error"] == "Odd: no message"
    assert row["correct"] == "False"
    assert "ratio" not in row


def test_options_beside_the_default() -> None:
    case = AttentionCase("windows", (4, 6, 6), NeighborhoodPattern((3, 3, 3)), 5, 2, 16, torch.float32)
    first, halo, refused = option_rows(case, ("grouped", "halo", "triton-int8"), 1, "cpu")
    assert first["over_first"] == 1.0
    assert halo["error"] < 1e-5
    assert halo["seconds"] > 0
    assert halo["computed_density"] <= first["computed_density"]
    assert "seconds" not in refused
    assert "needs a GPU" in refused["error"] or "triton" in refused["error"]
    unserved = list(option_rows(case, ("triton-int8", "grouped"), 1, "cpu"))
    assert unserved[1]["over_first"] is None
    names = [name for name, _ in option_jobs([TOY, case], 1, "cpu")]
    assert names == ["options toy", "options windows", "full tiles D64", "full tiles D128"]


def test_full_tiles_beside_the_default() -> None:
    first, refused = full_tile_rows(128, 2, 16, 1, "cpu", ("grouped", "triton-full"))
    assert first["error"] < 1e-2
    assert first["seconds"] > 0
    assert "seconds" not in refused
    assert "cannot serve" in refused["error"]


def test_a_case_that_fails_leaves_its_reason_and_the_others(tmp_path: Path) -> None:
    def broken():
        yield {"case": "half"}
        raise RuntimeError("out of memory\nand more")

    jobs = [("broken", broken), ("whole", lambda: [{"case": "whole", "seconds": 1.0}])]
    assert run_jobs(jobs, tmp_path / "rows.csv", FACTS, _later()) == ["broken"]
    rows = _rows(tmp_path / "rows.csv")
    assert [row["case"] for row in rows] == ["half", "broken", "whole"]
    assert rows[1]["error"] == "RuntimeError: out of memory"


def test_a_second_run_goes_on_behind_what_was_begun(tmp_path: Path) -> None:
    table, ran = tmp_path / "rows.csv", []

    def job(name: str):
        return name, lambda: [{"case": ran.append(name) or name}]

    def stops():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job("a"), ("hangs", stops), job("b")], table, FACTS, _later())
    assert run_jobs([job("a"), ("hangs", stops), job("b")], table, FACTS, _later()) == ["hangs"]
    assert ran == ["a", "b"]
    assert run_jobs([job("a"), ("hangs", stops), job("b")], table, FACTS, _later()) == []
    assert [row["case"] for row in _rows(table)] == ["a", "hangs", "b"]
    assert _rows(table)[1]["error"] == "it did not end in an earlier process"


def test_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="illegal memory access"):
        run_jobs([("lost", lost), ("next", lambda: pytest.fail("ran"))], tmp_path / "rows.csv", FACTS, _later())
    assert (tmp_path / "journal.txt").read_text().splitlines() == ["begin lost", "end lost"]
    run_jobs([("good", lambda: [{"case": "good"}])], tmp_path / "rows.csv", FACTS, _later())
    assert (tmp_path / "journal.txt").read_text().splitlines()[2:] == ["begin good", "row good", "end good"]


def test_what_no_longer_fits_the_time_is_named(tmp_path: Path) -> None:
    assert run_jobs([("late", lambda: [{"case": "late"}])], tmp_path / "rows.csv", FACTS, 0.0) == ["late"]
    assert not (tmp_path / "rows.csv").exists()


def test_shapes_of_a_step_are_those_of_the_models() -> None:
    """Wan 2.1 14B on 81 frames of 720 x 1280 and HunyuanVideo on 129, as their presets have them."""
    for shape, name in ((WAN_14B, "wan-14b"), (HUNYUAN, "hunyuan-video")):
        known = PRESETS[name]
        layout = known.layout((720, 1280), known.frames)
        assert (shape.grid, shape.heads, shape.head_dim) == (layout.grid, known.heads, known.head_dim)
        assert (shape.hidden, shape.blocks) == (known.ffn, known.layers)
        assert (shape.text, shape.context) == (known.joint_tokens, known.cross_tokens)
    assert HUNYUAN.longer(4).grid == (129, 45, 80)
    assert HUNYUAN.longer(4).name == "hunyuan 720p 4x"


def test_a_denoising_step_of_both_kinds(tmp_path: Path) -> None:
    shapes = [StepShape("wan", (3, 4, 4), 2, 8, 32, 40, context=6), StepShape("joint", (3, 4, 4), 2, 8, 32, 60, text=5)]
    assert run_jobs(step_jobs(shapes, "cpu", "auto"), tmp_path / "rows.csv", FACTS, _later()) == []
    wan, joint = _rows(tmp_path / "rows.csv")
    assert (wan["seqlen"], joint["seqlen"]) == ("48", "53")
    assert float(wan["speedup"]) == pytest.approx(float(wan["dense_seconds"]) / float(wan["sparse_seconds"]))
    assert (WAN_14B.width, HUNYUAN.width) == (5120, 3072)
    assert WAN_14B.longer(4).grid == (81, 45, 80)


def test_settings_side_by_side() -> None:
    def timer(kernel: str, setting: tuple[int, ...]) -> float:
        if setting[0] == 4:
            raise RuntimeError("too few registers")
        return 0.5

    rows = list(setting_rows(TOY, timer))
    assert len(rows) == len(SETTINGS)
    assert {row["warps"] for row in rows if "seconds" in row} == {8}
    assert all(row["error"] == "RuntimeError: too few registers" for row in rows if row["warps"] == 4)


def test_the_check_sees_a_right_and_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Check("windows", NeighborhoodPattern((2, 3, 3)), (2, 4, 5), 5, 4, 2, 16, torch.float32, masked=True, impl="grouped")
    monkeypatch.setattr(gpu_check, "_has_backward", lambda check: True)
    for first, tail in ((False, None), (True, "mean")):
        row = check_row(SimpleNamespace(**{**vars(small), "layout": small.layout, "first": first, "tail": tail}), "cpu")
        assert row["correct"], row
        assert 0 < row["error"] < 1e-5
    honest = gpu_check.block_sparse_attention
    for place, lie in ((0, lambda x: x * 1.01), (1, lambda x: x + 0.1)):

        def wrong(*args, place=place, lie=lie, **options):
            out = list(honest(*args, **options))
            out[place] = lie(out[place])
            return tuple(out)

        monkeypatch.setattr(gpu_check, "block_sparse_attention", wrong)
        assert not check_row(small, "cpu")["correct"], "output" if place == 0 else "log-sum-exp"


def test_cases_and_checks_cover_what_ships() -> None:
    names = {case.name for case in lease_cases()}
    for model in ("hunyuan 720p", "wan 720p"):
        for pattern in ("radial", "gna strided", "gna sliding"):
            assert {f"{pattern} {model}", f"{pattern} {model} masked"} <= names
    kinds = checks()
    assert {torch.bfloat16, torch.float16, torch.float32} == {c.dtype for c in kinds}
    assert {"triton", "halo", "triton-int8"} == {c.impl for c in kinds}
    assert any(c.tail for c in kinds)
    assert any(c.masked for c in kinds)
    assert any(c.first and c.kv_heads < c.heads for c in kinds)
    assert [name for name, _ in jobs_of("check", ("check",), 1, "cpu", "", False)][-1] == "check far rows"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_is_compiled_first_is_what_is_launched() -> None:
    wanted = specs(("check", "forward", "settings", "backward"))
    assert len(wanted) == len(set(wanted))
    kernel, arguments = launch_of_spec(("case", 0, "forward", None), "sm_90")
    assert set(arguments) - {"num_warps", "num_stages"} == {p.name for p in kernel.params}
    assert arguments["PRECISION"] == "ieee"
    assert launch_of_spec(("check", 8, "dq", None), "sm_90")[1]["PRECISION"] == "tf32x3", "float32, as on a GPU"
    _, persistent = launch_of_spec(("case", 0, "forward", (8, 3, 1, 2, 1)), "sm_90")
    assert persistent["PERSISTENT"]
    assert persistent["num_stages"] == 3


def test_a_process_that_is_lost_or_hangs_costs_its_case_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int | str] = [3, "hung", 0]
    monkeypatch.setattr(lease, "_watched", lambda *_: codes.pop(0))
    assert lease.run(tmp_path, 60.0) == 3
    assert (tmp_path / "verdict.md").is_file()
    assert "a lost device" in (tmp_path / "log.txt").read_text()


def test_options_behind_the_dashes_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lease, "_watched", lambda command, *_: asked.append(command) or 0)
    assert lease.main([str(tmp_path), "--seconds", "60", "--", "--toy", "--part", "check"]) == 0
    assert asked[0][-3:] == ["--toy", "--part", "check"]
    assert asked[0][asked[0].index("--out") + 1] == str(tmp_path)


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    journal = tmp_path / "journal.txt"
    code = "import time; time.sleep(60)"
    with (tmp_path / "log").open("w") as log:
        started = time.monotonic()
        assert lease._watched([sys.executable, "-c", code], log, journal, started + 60, 1.0) == "hung"
        assert lease._watched([sys.executable, "-c", code], log, journal, time.monotonic() + 1, 30.0) == 1
        assert lease._watched([sys.executable, "-c", "raise SystemExit(3)"], log, journal, started + 60, 30.0) == 3
        assert time.monotonic() - started < 30


def test_the_verdict_tells_ratio_flex_and_what_failed(tmp_path: Path) -> None:
    from genattn.apps.sampling.measured_rows import append_rows

    row = {"case": "radial", "dense": "sdpa:cudnn", "device": "H200", "density": 0.2}
    append_rows(tmp_path / "attention.csv", [
        {**row, "impl": "triton", "seconds": 1.0, "ratio": 1.15, "correct": True, "error": 0.002},
        {**row, "impl": "flex", "seconds": 1.5, "ratio": 1.7, "correct": True, "error": 0.002},
        {**row, "case": "sliding", "impl": "triton", "correct": False, "error": "OutOfResources: shared memory"},
    ])  # fmt: skip
    append_rows(tmp_path / "gpu_check.csv", [{"case": "check radial", "error": 1e-3, "lse_error": 1e-4, "correct": True}])
    text = write_verdict(tmp_path)
    assert "| radial | 1.15 | sdpa:cudnn | 1.50 | yes, 2e-03 | good |" in text
    assert "| sliding |  | sdpa:cudnn |  | NO, OutOfResources: shared memory | no speed |" in text
    assert "Checks: 1 of 1 right." in text
    assert "* sliding: OutOfResources: shared memory" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_whole_lease_without_a_gpu(tmp_path: Path) -> None:
    """The script as it would be run, every part but flex, in Triton's interpreter; then once more, where nothing is left."""
    out, script = tmp_path / "out", ROOT / "apps" / "bench" / "lease.sh"
    env = dict(
        os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    parts = [x for p in ("check", "forward", "settings", "backward", "step", "options") for x in ("--part", p)]
    command = ["bash", str(script), str(out), "550", "--", "--toy", "--rounds", "1", *parts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    log = (out / "log.txt").read_text()
    assert "not measured: nothing" in log, log[-3000:]
    assert "WRONG" not in done.stdout, done.stdout
    assert "Nothing failed." in done.stdout, done.stdout
    assert f"Checks: {len(checks(True))} of {len(checks(True))} right." in done.stdout
    for case in toy_cases():
        assert f"| {case.name} |" in done.stdout
    before = (out / "attention.csv").read_text()
    subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert (out / "attention.csv").read_text() == before


@pytest.mark.parametrize("cases", [toy_cases, lease_cases])
def test_cases_are_what_their_names_say(cases: Any) -> None:
    """Two shapes of windows, with and without a step of their own; masked ones hide keys."""
    found = {case.name: case for case in cases()}
    assert len(found) == len(cases())
    for name, case in found.items():
        assert (case.hidden > 0) == ("masked" in name)
        if "sliding" in name:
            strided = found[name.replace("sliding", "strided")]
            assert case.pattern.stride == 1
            assert strided.pattern.stride != 1
            assert strided.pattern.window_size == case.pattern.window_size


def test_rounds_on_a_cpu_are_single_calls() -> None:
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu")
    assert calls == ["a", "b", "a", "b", "a", "b"], "one to warm up, then in turns"
    assert all(len(t) == 2 for t in times.values())
    assert timed(lambda: time.sleep(0.01), "cpu", 2) >= 0.009


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0007, 3), (0.0, 200), (10.0, 1)])
def test_rounds_on_a_gpu_repeat_short_calls(seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch has a cost of its own; a call of seconds is not made twice to warm up."""
    made: list[int] = []
    monkeypatch.setattr(timing, "timed", lambda call, device, repeats=1: made.append(repeats) or seconds)
    assert interleaved({"a": lambda: None}, 2, "cuda:0") == {"a": [seconds, seconds]}
    assert made == [1] * (2 if seconds < 1 else 1) + [repeats] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the whole benchmark would run")
def test_no_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "a GPU must be there" in capsys.readouterr().err


def test_where_no_dense_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("too long")

    probe, calls = torch.zeros(1, 4, 1, 8), {"sdpa:flash": refuses, "sdpa:cudnn": refuses, "sdpa": lambda *tensors: tensors[0]}
    monkeypatch.setattr(denoising_step, "dense_backends", lambda probe: (calls, {}))
    with pytest.raises(RuntimeError, match=r"no dense backend serves \(1, 4, 1, 8\) on cpu, of sdpa:flash, sdpa:cudnn"):
        denoising_step.fastest_dense(probe, 1.0, "cpu")
    calls["sdpa:cudnn"] = lambda *tensors: tensors[0]
    assert denoising_step.fastest_dense(probe, 1.0, "cpu")[0] == "sdpa:cudnn"

    def full(*tensors: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    calls["sdpa:flash"] = full  # no refusal: a larger card would run it
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        denoising_step.fastest_dense(probe, 1.0, "cpu")


def test_a_gpus_milliseconds_are_told_as_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("all done"))
    assert timed(lambda: happened.append("call"), "cuda:0", 4) == 0.125
    assert happened == ["all done", "record", *["call"] * 4, "record", "wait"]
