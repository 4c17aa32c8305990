"""The generated tables of docs/adaptive.md, and the findings behind the evidence."""

import csv
from pathlib import Path
from typing import Any

import pytest

from genattn.apps.pages.adaptive_table import adaptive_table, break_even_table, selection_table
from genattn.apps.pages.evidence_patterns import clusters, error_aware, profiled, stand_in
from genattn.apps.pages.evidence_tables import MINIATURE, NOT, NotMeasuredError, Tables
from genattn.errors import GenAttnError

FACTS = {"device": "CPU, 1 threads", "torch_version": "2", "date": "2026-01-01", "commit": "abc"}


def _row(pattern: str, tail: str, error: float, psnr: float, share: float = 0.25, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"model": "tiny-wan", "share": share, "pattern": pattern, "tail": tail, "captions": 4}
    row |= {"density": share, "error": error, "ssim": 0.9, "oracle": 1.0, "seconds": 3.0, "speedup": 0.9}
    for name, value in (("psnr", psnr), ("psnr_gain", psnr - 20)):
        row |= {name: value, f"{name}_low": value - 1, f"{name}_high": value + 1}
    return row | FACTS | more


ROWS = [
    _row("radial", "", 0.6, 20.0),
    _row("top-k", "", 0.5, 21.0),
    _row("top-k", "mean", 0.2, 25.0),
    _row("error-aware", "mean", 0.15, 26.0),
    _row("clusters", "", 0.55, 20.0),
    _row("profiled", "mean", 0.12, 28.0),
]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_row_is_shown_in_order(tmp_path: Path) -> None:
    text = adaptive_table(_write(tmp_path, "adaptive", ROWS))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        "radial (static, the released mask)",
        "top-k",
        "top-k",
        "error-aware",
        "clusters",
        "profiled map",
    ]
    assert "| profiled map | mean | 0.250 | 0.120 | 28.0 [27.0, 29.0] | +8.0 [7.0, 9.0] |" in text
    assert "**tiny-wan, share 0.25**" in text
    with pytest.raises(GenAttnError, match="is not there; measure first"):
        adaptive_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("model\n")
    with pytest.raises(GenAttnError, match="must hold rows, got none"):
        adaptive_table(tmp_path / "empty.csv")


def test_costs_and_break_even(tmp_path: Path) -> None:
    row = {"pattern": "top-k", "tokens": 8192, "heads": 2, "head_dim": 64, "density": 0.27, "share": 0.012, "of_saved": 0.02}
    text = selection_table(_write(tmp_path, "selection", [row | FACTS, row | FACTS | {"pattern": "x", "of_saved": ""}]))
    assert "| top-k | 8192 | 0.27 | 1.2% | 2.0% |" in text
    assert "| x | 8192 | 0.27 | 1.2% | nothing saved |" in text
    rows = [
        {"backend": "cpu", "share": 0.25, "tokens": n, "speedup": s, "heads": 2, "head_dim": 64} | FACTS
        for n, s in ((256, 0.8), (512, 1.25))
    ]
    assert "| cpu | 0.25 | 0.80x | 1.25x |" in break_even_table(_write(tmp_path, "break_even", rows))


def test_findings(tmp_path: Path) -> None:
    _write(tmp_path, "adaptive", ROWS)
    tables = Tables(tmp_path)
    assert stand_in(tables).verdict == MINIATURE
    assert "0.500 and 0.200" in stand_in(tables).measured
    assert error_aware(tables).verdict == MINIATURE
    assert clusters(tables).verdict == NOT
    assert profiled(tables).verdict == MINIATURE
    worse = tmp_path / "worse"
    worse.mkdir()
    _write(worse, "adaptive", [*ROWS[:3], _row("profiled", "mean", 0.24, 24.0)])
    assert profiled(Tables(worse)).verdict == NOT
    with pytest.raises(NotMeasuredError, match="has no errors of"):
        clusters(Tables(worse))
