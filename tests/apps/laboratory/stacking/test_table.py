"""The stacking table is what its rows say, and shows no cell that failed."""

import csv
from pathlib import Path

import pytest

from genattn.apps.laboratory.stacking.table import stacking_table
from genattn.errors import GenAttnError

WHERE = {"device": "CPU", "torch_version": "2", "diffusers_version": "0", "commit": "abc", "date": "2026-01-02"}


def table(path: Path, *rows: tuple[str, str, str, str, str]) -> str:
    names = ("neighbour", "method", "result", "error", "note")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, "package", "version", *WHERE])
        writer.writeheader()
        for row in rows:
            writer.writerow({**dict(zip(names, row)), "package": "thing", "version": "" if row[0] == "B" else "1.5", **WHERE})
    return stacking_table(path)


def test_cells_notes_and_where(tmp_path: Path) -> None:
    shown = table(
        tmp_path / "rows.csv",
        ("A", "dense", "differs", "1e+0", ""),  # an earlier run, mended since
        ("A", "dense", "equal", "0.0e+00", ""),
        ("A", "NAG", "within", "3.0e-07", ""),
        ("B", "dense", "not tried", "0.0e+00", "not installed"),
        ("B", "NAG", "not tried", "0.0e+00", "not installed"),
        ("C", "NAG", "refused", "0.0e+00", "because"),
    ).splitlines()
    assert shown[0] == "| beside | dense | NAG |"
    assert shown[2:5] == [
        "| A (thing 1.5) | equal | within 3.0e-07 |",
        "| B | not tried (1) | not tried (1) |",
        "| C (thing 1.5) | - | refused (2) |",
    ]
    assert shown[6:8] == ["1. not installed", "2. because"]
    assert "2026-01-02, commit abc" in shown[-1]


def test_a_failed_cell_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="A with dense must be as its reference, got: relative error 2e-01"):
        table(tmp_path / "rows.csv", ("A", "dense", "differs", "2e-01", ""))
