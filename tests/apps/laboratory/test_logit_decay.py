"""The measurement of decayed plans: its rows, its tables, and that straddling tiles are held against the rule."""

import pytest

from genattn.apps.laboratory.plans import logit_decay
from genattn.apps.sampling.measured_rows import append_rows
from genattn.errors import GenAttnError
from genattn.patterns.radial import RadialPattern


def test_rows_become_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(logit_decay, "COST", {"dense": logit_decay.COST["dense"]})
    cost = logit_decay.cost_rows((6, 8, 8), 16, 1)
    assert [(row["impl"], row["base"]) for row in cost] == [("cpu", "without"), ("LogitDecay", "sdpa"), ("grouped", "without")]
    assert all(row["over"] > 0 and row["trained"] == 3 for row in cost)
    monkeypatch.setattr(logit_decay, "STRADDLE", {"radial": logit_decay.STRADDLE["radial"]})
    straddle = logit_decay.straddle_rows((6, 2, 2), 4, 3)
    facts = {"date": "x", "commit": "y", "device": "CPU"}
    rows = [{"measured": what} | row | facts for what, some in (("cost", cost), ("straddle", straddle))
            for row in some]  # fmt: skip
    append_rows(tmp_path / "rows.csv", rows)
    table = logit_decay.tables(tmp_path / "rows.csv")
    assert "x dense SDPA" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(cost) + 2 + len(straddle)
    assert "384 tokens in 6 frames, trained 3, one head of 16" in table
    assert "<sub>6 frames, trained 3" in table


def test_tiles_that_keep_to_frames_leave_no_error_and_others_less_than_no_decay(monkeypatch):
    keeping = {name: logit_decay.STRADDLE[name] for name in ("dense", "window 12x3x3")}
    monkeypatch.setattr(logit_decay, "STRADDLE", keeping)
    assert all(row["error"] < 1e-12 for row in logit_decay.straddle_rows((12, 4, 4), 24, 4))
    monkeypatch.setattr(logit_decay, "STRADDLE", {"radial": RadialPattern(decay=0.3, tail=None)})
    (exact,), (wide,) = (logit_decay.straddle_rows((10, 4, 4), block, 4) for block in (16, 24))
    assert exact["error"] < 1e-12
    assert 0.01 < wide["error"] < wide["error_without"] == exact["error_without"]


def test_unknown_parts_are_refused():
    with pytest.raises(GenAttnError, match="measures cost or straddle"):
        logit_decay.main("speed")
