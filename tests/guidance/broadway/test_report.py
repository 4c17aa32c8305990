"""What was measured can be read: rows, blocks, table, JSON, plot, a suggestion."""

import json
from pathlib import Path

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.guidance.broadway.report import NUMBERS, BroadWayReport
from genattn.guidance.broadway.temporal_map import EditScalars, MapEdit, edit_map
from genattn.seam.plugin import Run


def measured(alpha: float = 0.0, beta: float = 1.0) -> BroadWayReport:
    report = BroadWayReport()
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for block in ("up_blocks.1", "up_blocks.2"):
            for site in range(2):
                rows, anchor = ((torch.randn(4, 16, 16, generator=generator)).softmax(-1) for _ in range(2))
                _, scalars = edit_map(rows, None if block == "up_blocks.1" else anchor, MapEdit(alpha, beta))
                report.add(f"{block}.attn{site}", block, 16, Run(step=step, num_steps=10, pass_name="cond_uncond"), scalars)
    return report


def test_rows_and_means() -> None:
    report = measured(0.5, 1.5)
    rows, blocks = report.rows(), report.by_block()
    assert len(rows) == len(report) == 12
    assert len(blocks) == 6
    first = [r for r in rows if r["block"] == "up_blocks.2" and r["step"] == 0]
    mean = next(b for b in blocks if b["block"] == "up_blocks.2" and b["step"] == 0)
    assert mean["calls"] == 2
    for name in NUMBERS:
        assert mean[name] == pytest.approx(sum(r[name] for r in first) / 2)
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) for r in rows)


def test_table_json_plot(tmp_path: Path) -> None:
    report = measured(0.5, 1.5)
    table = report.table()
    assert "up_blocks.2" in table
    assert "disparity" in table
    assert len(table.strip().splitlines()) == 7
    report.save_json(tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["by_block"] == report.by_block()
    assert told["suggestion"]["alpha"] >= 0
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_suggestion_follows_the_disparity() -> None:
    suggestion = measured().suggest()
    # unrelated random maps: the distance between them is about sqrt(2) of their motion
    assert suggestion["relative_disparity"] == pytest.approx(2**0.5, rel=0.05)
    assert suggestion["alpha"] == pytest.approx(1 - 0.5 / 2**0.5, abs=0.03)
    rows, anchor = (torch.randn(64, 16, 16).softmax(-1) for _ in range(2))
    _, scalars = edit_map(rows, anchor, MapEdit(suggestion["alpha"], 1.0))
    assert suggestion["beta"] == pytest.approx(float(scalars.beta), rel=0.05)


def test_unrelated_maps_are_told_and_related_ones_are_not() -> None:
    warning = measured().warning()
    assert warning is not None
    assert "nearly unrelated (correlation about" in warning
    assert measured().to_dict()["warning"] == warning
    report, generator = BroadWayReport(), torch.Generator().manual_seed(1)
    assert report.warning() is None
    logits = torch.randn(4, 16, 16, generator=generator)
    rows, anchor = logits.softmax(-1), (logits + 0.3 * torch.randn(4, 16, 16, generator=generator)).softmax(-1)
    _, scalars = edit_map(rows, anchor, MapEdit(0.0, 1.0))
    report.add("up_blocks.2.attn0", "up_blocks.2", 16, Run(step=0, num_steps=10, pass_name="cond"), scalars)
    assert report.warning() is None


def test_nothing_measured(tmp_path: Path) -> None:
    report = BroadWayReport()
    assert report.rows() == []
    assert report.to_dict()["suggestion"] is None
    with pytest.raises(GenAttnError, match="a suggestion needs guided attentions"):
        report.suggest()
    with pytest.raises(GenAttnError, match="a plot needs guided attentions"):
        report.plot(tmp_path / "no.png")


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(GenAttnError, match="plot\\(\\) needs matplotlib"):
        measured().plot(tmp_path / "no.png")


def test_old_records_fall_off_and_clear() -> None:
    report = BroadWayReport()
    number = torch.tensor(1.0)
    scalars = EditScalars(*[number] * 6)
    for step in range(20_010):
        report.add("a", "b", 16, Run(step=step), scalars)
    assert len(report) == 20_000
    report.clear()
    assert len(report) == 0
