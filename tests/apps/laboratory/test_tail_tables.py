"""The laboratory of the tail: its second order against sums written out, its tables from rows, what it refuses."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genattn.apps.laboratory import tail as laboratory
from genattn.errors import GenAttnError
from genattn.kernels.plan.block_plan import run_tiles
from genattn.kernels.plan.random_plan import plan_from_states


def _call() -> tuple[SimpleNamespace, torch.Tensor]:
    states = torch.tensor([[[2, 0, 0], [0, 2, 2], [2, 2, 2]]])
    query, key, value = torch.randn(3, 1, 12, 1, 4)
    return SimpleNamespace(query=query, key=key, value=value, scale=0.5), states


def test_second_order_is_the_sum_written_out() -> None:
    call, states = _call()
    plan = plan_from_states(states, run_tiles(12, 4), run_tiles(12, 4), None, 12, 12)
    got = laboratory.stand_in(call, plan, "variance")  # type: ignore[arg-type]
    query, key, value = (x[0, :, 0] for x in (call.query, call.key, call.value))
    scores, values = [0.5 * key[:4] @ query[0]], [value[:4]]
    for tile in (slice(4, 8), slice(8, 12)):
        spread = key[tile].var(0, correction=0)
        scores.append((0.5 * query[0] @ key[tile].mean(0) + 0.125 * query[0] ** 2 @ spread + torch.tensor(4.0).log())[None])
        values.append(value[tile].mean(0)[None])
    torch.testing.assert_close(got[0, 0, 0], torch.cat(scores).softmax(0) @ torch.cat(values))


def test_whole_tiles_and_tails_are_what_the_names_say() -> None:
    call, states = _call()
    plan = plan_from_states(states, run_tiles(12, 4), run_tiles(12, 4), None, 12, 12)
    plain, whole, mean = (laboratory.stand_in(call, plan, name) for name in ("none", "whole", "mean"))  # type: ignore[arg-type]
    assert torch.equal(plain, whole)
    assert not torch.allclose(plain[:, :8], mean[:, :8])
    assert torch.equal(plain[:, 8:], mean[:, 8:]), "a query that skips nothing"


def test_tables_hold_the_last_run(tmp_path: Path) -> None:
    path = tmp_path / "tail.csv"
    rows = []
    for commit, error in (("old", 0.9), ("new", 0.25)):
        facts = {"commit": commit, "date": "2026-11-29", "weights": "w", "share": 0.3}
        for kind in laboratory.STAND_INS:
            some = {"measured": "error", "pattern": "window", "stand_in": kind, "layer": "all"}
            rows.append({**facts, **some, "error": error, "worse_calls": 0.5})
        for kind in laboratory.TAILS:
            size = {"head_dim": 64, "seqlen": 8192, "tile": 128, "heads": 2, "rounds": 7, "device": "CPU"}
            rows.append({**facts, "measured": "cost", "stand_in": kind, "impl": "cpu", "over": 1 + error / 10, **size})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
    text = laboratory.error_table(path)
    assert "| window | 0.300 | 0.250 |" in text
    assert "50% / 50%" in text
    assert "0.900" not in text
    cost = laboratory.cost_table(path)
    assert "| `cpu` | 64 | 0.30 | +2.5% | +2.5% |" in cost
    assert "+9.0%" not in cost
    assert "8192 tokens, tiles of 128, 2 heads; processor time, median of 7 interleaved rounds. CPU, 2026-11-29." in cost


def test_what_it_does_not_measure_is_refused() -> None:
    with pytest.raises(GenAttnError, match="this measures error, videos or cost of radial"):
        laboratory.main("speed")
    with pytest.raises(GenAttnError, match=r"of \['round'\]"):
        laboratory.main("videos", pattern=["round"])
