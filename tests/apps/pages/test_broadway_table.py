"""The docs' table of BroadWay's study shows the newest rows, their changes and the verdict."""

import csv
from pathlib import Path

import numpy as np
import pytest

from genattn.apps.pages.broadway_table import broadway_table
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.pipelines.tiny.studies.broadway import MEASURES, rows_of


def study(shift: float) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    stock = {name: rng.normal(2.0, 1.0, 30) for name in MEASURES}
    both = dict(stock, dynamic_degree=stock["dynamic_degree"] + shift + 0.1 * rng.normal(size=30))
    rows = rows_of({"stock": stock, "both": both}, {"stock": 1.0, "both": 1.0})
    settings = {"model": "tiny-animatediff", "alpha": 0.6, "beta": 1.5, "stop": 0.2, "steps": 20}
    return [provenance(cpu=True) | settings | row for row in rows]


def test_the_newest_study_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "broadway.csv"
    append_rows(file, study(-1.0))
    append_rows(file, study(1.0))
    append_rows(file, [row | {"model": "tiny-wan", "clips": 9} for row in study(-2.0)])
    text = broadway_table(file, "tiny-animatediff")
    with file.open(newline="") as handle:
        newest = list(csv.DictReader(handle))[-1]
    assert f"| dynamic degree | {float(newest['dynamic_degree']) - float(newest['dynamic_degree_change']):.4g} | +" in text
    assert "| smoothness |" in text
    assert "both: the claim holds" in text
    assert "30 captions" in text
    assert "20% of the steps" in text


def test_a_variant_that_was_measured_again_stands_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "broadway.csv"
    stock, both = (row | {"date": "2026-11-20", "commit": "earlier"} for row in study(-1.0))
    append_rows(file, [stock, both | {"variant": "enhancement"}, both])
    append_rows(file, [row | {"commit": "later"} for row in study(1.0)])
    text = broadway_table(file, "tiny-animatediff")
    assert text.splitlines()[0] == "| measure | stock | enhancement | both |"
    assert text.endswith("commit later; enhancement: 2026-11-20, commit earlier.</sub>")
    assert "enhancement: the claim fails" in text
    assert "both: the claim holds" in text


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="studies.broadway --table"):
        broadway_table(tmp_path / "no.csv", "tiny-wan")


def test_a_model_without_rows_names_its_study(tmp_path: Path) -> None:
    append_rows(tmp_path / "broadway.csv", study(1.0))
    with pytest.raises(GenAttnError, match="must have rows of tiny-wan, got none; run its study with --model assets/tiny-wan"):
        broadway_table(tmp_path / "broadway.csv", "tiny-wan")
