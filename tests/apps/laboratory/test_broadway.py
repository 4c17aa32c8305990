"""The cost benchmark at toy size: it checks before it times, and its rows say what they are."""

import csv
from pathlib import Path

import pytest
import torch

from genattn.apps.laboratory import broadway as bench
from genattn.errors import GenAttnError


def test_rows_at_toy_size(tmp_path: Path) -> None:
    sizes = ["--grid", "6", "5", "6", "--heads", "2", "--dim", "12", "--layers", "2", "--latent", "8"]
    table = tmp_path / "cost.csv"
    rows = bench.main([*sizes, "--channels", "32", "32", "32", "32", "--repeats", "1", "--note", "toy", "--table", str(table)])
    by_name = {(row["measured"], row["method"]): row for row in rows}
    assert by_name["attention", "stock"]["over_stock"] == 1
    pooled = [row for row in rows if row["method"].startswith("pooled")]
    assert len(pooled) == 3
    assert all(row["over_stock"] > 1 for row in pooled)  # they pay for the stock output as well
    for name in ("video DiT", "motion UNet"):
        row = by_name[name, "defaults"]
        assert row["run_overhead"] == pytest.approx(0.2 * (row["over_stock"] - 1), abs=1e-4)
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows) == 7
    assert {"device", "commit", "date", "note"} <= set(written[0])


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = bench.edited_attention

    def wrong(*args: object, **kwargs: object) -> object:
        result = stock(*args, **kwargs)  # type: ignore[arg-type]
        result.out.add_(0.1)
        return result

    monkeypatch.setattr(bench, "edited_attention", wrong)
    with pytest.raises(GenAttnError, match="must equal the full map within 1e-4"):
        bench.attention_rows((4, 2, 2), 2, 8, 1, "cpu")


def test_a_changed_model_is_not_timed() -> None:
    class Forgetful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, return_dict: bool) -> tuple[torch.Tensor]:
            self.calls += 1
            return (torch.full((2,), float(self.calls)),)

    model = Forgetful()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(bench.genattn, "apply", lambda *a: _Nothing(), raising=False)
    try:
        with pytest.raises(GenAttnError, match="must be stock within 1e-4"):
            bench.model_row("toy", model, {}, 1, 1)
    finally:
        monkeypatch.undo()


class _Nothing:
    def set(self, **options: object) -> "_Nothing":
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None
