"""The attention benchmark on a toy case: rows, refusal of a wrong result, plot, and the doctor."""

import csv

import matplotlib.pyplot
import pytest
import torch

from genattn.apps.bench import attention as bench
from genattn.apps.bench.cases import AttentionCase, cpu_cases, gpu_cases
from genattn.apps.bench.doctor import bug_report, describe_doctor, doctor, without_folders
from genattn.errors import RunFailed
from genattn.functional.dispatch import attention
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

TOY = [AttentionCase("toy", (9, 8, 8), RadialPattern(), 5, 1, 16, torch.float32)]


def test_rows_hold_what_a_reader_needs(tmp_path):
    rows = bench.bench_attention(True, "cpu", tmp_path / "rows.csv", 2, TOY, ["grouped", "reference"], lambda line: None)
    with (tmp_path / "rows.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["impl"] for row in written] == ["grouped", "reference"]
    for name in ("ratio", "density", "seconds", "speedup", "roofline_share", "loadavg", "commit", "date", "device", "dense"):
        assert written[0][name]
    row = rows[0]
    assert row["ratio"] == pytest.approx(row["seconds"] / (row["density"] * row["dense_seconds"]))
    bench.plot_attention(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_plot_that_cannot_be_written_leaves_no_figure_open(monkeypatch, tmp_path):
    rows = bench.bench_attention(True, "cpu", None, 1, TOY, ["grouped"], lambda line: None)
    monkeypatch.setattr(matplotlib.pyplot, "figure", lambda *a, **k: pytest.fail("pyplot keeps what it opens in memory"))
    (tmp_path / "plot.png").mkdir()
    with pytest.raises(OSError, match="plot.png"):
        bench.plot_attention(rows, tmp_path / "plot.png")


def test_a_wrong_result_gets_no_speed(monkeypatch, tmp_path):
    honest = bench.block_sparse_attention
    monkeypatch.setattr(bench, "block_sparse_attention", lambda *a, **k: honest(*a, **k) * 1.01)
    rows = bench.bench_attention(True, "cpu", None, 1, TOY, ["grouped"], lambda line: None)
    assert not rows[0]["correct"]
    assert "ratio" not in rows[0]
    assert "WRONG" in bench.describe_row(rows[0])
    with pytest.raises(RunFailed, match="at least one correct row.*nothing was drawn"):
        bench.plot_attention(rows, tmp_path / "plot.png")


def test_natten_is_measured_from_the_pattern_where_it_can_serve(monkeypatch):
    pattern = NeighborhoodPattern((3, 4, 4))
    cases = [AttentionCase(f"toy {text}", (5, 8, 8), pattern, text, 1, 16, torch.float32) for text in (0, 5)] + TOY

    def natten(query, key, value, windows):
        assert windows.window == (3, 4, 4)
        return attention(query, key, value, pattern, TokenLayout.from_grid(windows.grid), impl="reference")

    monkeypatch.setattr(bench, "natten_attention", natten)
    monkeypatch.setattr(bench, "why_not_natten", lambda query, windows: None)
    rows = bench.bench_attention(True, "cpu", None, 1, cases, ["grouped", "natten"], lambda line: None)
    assert [(row["case"], row["impl"]) for row in rows] == [
        ("toy 0", "grouped"), ("toy 0", "natten"), ("toy 5", "grouped"), ("toy", "grouped")
    ]  # fmt: skip
    assert all(row["correct"] for row in rows)
    assert "natten" in bench._default_impls("cuda:0", True)
    assert "natten" not in bench._default_impls("cpu", False)


def test_a_named_backend_that_serves_nothing_is_told():
    lines = []
    rows = bench.bench_attention(True, "cpu", None, 1, TOY, ["grouped", "triton", "natten"], lines.append)
    assert [row["impl"] for row in rows] == ["grouped"]
    assert [line.split()[0] for line in lines[1:]] == ["triton", "natten"]
    assert all("can serve none of these cases" in line for line in lines[1:])


def test_cases_have_plans_of_their_names():
    names = [case.name for case in (*cpu_cases(), *gpu_cases())]
    assert all(len(names) > 5 and case.layout.seqlen >= 4096 for case in (*cpu_cases(), *gpu_cases()))
    assert len(cpu_cases(quick=True)) == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cache /home/ada/.cache/genattn", "cache .../genattn"),
        (r"cache C:\Users\ada\genattn", r"cache ...\genattn"),
        ("radial 41x16x32, a/b and 0.28/1", "radial 41x16x32, a/b and 0.28/1"),
    ],
)
def test_a_report_names_no_private_folder(text: str, wanted: str) -> None:
    assert without_folders(text) == wanted


def test_a_bug_report_has_versions_and_the_examination() -> None:
    facts = {"python": "3.11", "cache": "/home/ada/.cache/genattn", "backends": {"flex": "no"}, "dense": {}, "peers": {}}
    told = bug_report(facts)
    assert told.startswith("```\nsystem")
    assert "ada" not in told
    assert "diffusers" in told
    assert "no: no" in told


def test_doctor_says_why_not():
    facts = doctor()
    assert facts["backends"]["reference"] is None
    text = describe_doctor(facts)
    if not torch.cuda.is_available():
        assert "needs a GPU" in facts["backends"]["triton"]
        assert "no: it needs a GPU" in text
        assert facts["auto"] in ("cpu", "grouped")
