"""The table of longer fine-tuning: the newest whole study, its numbers, and what it refuses."""

import csv

import pytest

from genattn import GenAttnError
from genattn.apps.pages.finetune_table import ARMS, SHOWN, finetune_table

FACTS = {
    "clips": 24, "sampling_steps": 8, "rank": 16, "batch": 1, "device": "CPU", "torch": "2", "diffusers": "0", "date": "d",
    "commit": "c", "frames": 57,
}  # fmt: skip


def _row(arm, run, value, factor="2"):
    step = "" if arm == "untuned" else 0.31
    numbers = {f"{name}{part}": value for name, _ in SHOWN for part in ("", "_low", "_high")}
    return {
        "run": run, "factor": factor, "arm": arm, "train_steps": 300 if step else 0, "train_step_seconds": step,
        "sample_seconds": 3.14159, **numbers, **FACTS,
    }  # fmt: skip


def _write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_newest_study_of_each_length(tmp_path):
    old, new = ([_row(arm, run, value) for arm in ARMS] for run, value in (("a", 0.25), ("b", 0.75)))
    text = finetune_table(_write(tmp_path / "t.csv", old + new + [_row(arm, "c", 0.5, "4") for arm in ARMS]))
    lines = [line for line in text.splitlines() if line.startswith(("| 2x", "| 4x"))]
    assert len(lines) == 6
    assert all("0.75 [0.75, 0.75]" in line for line in lines[:3])
    assert "| untuned |" in lines[0]
    assert "| - | 3.14 |" in lines[0]
    assert "| 0.31 | 3.14 |" in lines[1]
    assert "300 at 2x, 300 at 4x" in text
    assert "0.25" not in text


def test_what_is_refused(tmp_path):
    with pytest.raises(GenAttnError, match="studies.finetune --table"):
        finetune_table(tmp_path / "none.csv")
    with pytest.raises(GenAttnError, match="lacks radial LoRA"):
        finetune_table(_write(tmp_path / "t.csv", [_row(arm, "a", 0.5) for arm in ARMS[:2]]))
