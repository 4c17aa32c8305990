"""The GPU benchmark on the CPU, at toy sizes and through the same code: rows at once, each case alone."""

import csv
import time
from pathlib import Path

import pytest
import torch

from genattn.apps.bench.cases import AttentionCase
from genattn.apps.bench.denoising_step import HUNYUAN, WAN_14B, StepShape
from genattn.apps.bench.gpu import (
    backward_rows,
    check_kernels,
    forward_jobs,
    full_tile_rows,
    main,
    option_jobs,
    option_rows,
    run_jobs,
    setting_rows,
    step_jobs,
)
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

TOY = AttentionCase("toy", (5, 8, 8), RadialPattern(), 5, 2, 16, torch.float32)
FACTS = {"device": "CPU"}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _later() -> float:
    return time.monotonic() + 600


def test_forward_and_backward_rows(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    assert run_jobs(forward_jobs([TOY], 1, "cpu", ["grouped"]), table, FACTS, _later()) == []
    (row,) = _rows(table)
    assert "sdpa:flash" in row["dense_times"]
    assert float(row["ratio"]) > 0
    run_jobs([("toy", lambda: backward_rows(TOY, 1, "cpu", "grouped"))], tmp_path / "back.csv", FACTS, _later())
    assert float(_rows(tmp_path / "back.csv")[0]["backward_ratio"]) > 0


def test_options_beside_the_default() -> None:
    case = AttentionCase("windows", (4, 6, 6), NeighborhoodPattern((3, 3, 3)), 5, 2, 16, torch.float32)
    first, halo, refused = option_rows(case, ("grouped", "halo", "triton-int8"), 1, "cpu")
    assert first["over_first"] == 1.0
    assert halo["error"] < 1e-5
    assert halo["seconds"] > 0
    assert halo["computed_density"] <= first["computed_density"]
    assert "seconds" not in refused
    assert "needs a GPU" in refused["error"] or "triton" in refused["error"]
    assert [name for name, _ in option_jobs([TOY, case], 1)] == ["full tiles D64", "full tiles D128", "toy", "windows"]


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


def test_what_no_longer_fits_the_time_is_named(tmp_path: Path) -> None:
    assert run_jobs([("late", lambda: [{"case": "late"}])], tmp_path / "rows.csv", FACTS, 0.0) == ["late"]
    assert not (tmp_path / "rows.csv").exists()


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
    assert {row["warps"] for row in rows if "seconds" in row} == {8}
    assert all(row["error"] == "too few registers" for row in rows if row["warps"] == 4)


def test_the_check_sees_a_right_and_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.apps.bench import gpu as bench_gpu

    monkeypatch.setattr(bench_gpu, "BOUNDS", {torch.float32: 1e-4})
    assert check_kernels("cpu", "grouped", (16,), (2, 5, 6)) == []
    honest = bench_gpu.block_sparse_attention
    monkeypatch.setattr(bench_gpu, "block_sparse_attention", lambda *a, **k: honest(*a, **k) * 1.01)
    assert len(check_kernels("cpu", "grouped", (16,), (2, 5, 6))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the whole benchmark would run")
def test_no_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "a GPU must be there" in capsys.readouterr().err
