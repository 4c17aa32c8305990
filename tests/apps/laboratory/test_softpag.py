"""The cost of SoftPAG is measured on what it does, and lands in a table."""

import csv
from pathlib import Path

import pytest

from genattn.apps.laboratory import softpag as bench_softpag


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_softpag, "LAYERS", 2)
    bench_softpag.main(["--pairs", "2", "--csv", str(tmp_path / "cost.csv")])
    with (tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["first_layer"]) for row in rows] == [0, 1, 1]
    assert float(rows[0]["ratio"]) > float(rows[1]["ratio"]) > 1


def test_a_cost_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_softpag, "LAYERS", 2)
    monkeypatch.setattr(bench_softpag.torch, "equal", lambda *_: True)
    with pytest.raises(RuntimeError, match="changed nothing"):
        bench_softpag.main(["--pairs", "2", "--csv", str(tmp_path / "cost.csv")])
