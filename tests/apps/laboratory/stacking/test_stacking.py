"""What stacks with what: cells that can fail, rows for every cell, and the command that writes them."""

import csv
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from genattn.apps.laboratory.stacking import cells, neighbours, run
from genattn.apps.laboratory.stacking.cells import METHODS, Cell, measure, version_of, why_not
from genattn.apps.laboratory.stacking.neighbours import NEIGHBOURS, Neighbour
from genattn.apps.laboratory.stacking.table import newest_rows
from genattn.errors import GenAttnError

BY_NAME = {neighbour.name: neighbour for neighbour in NEIGHBOURS}
METHOD = {method.name: method for method in METHODS}
pytestmark = pytest.mark.filterwarnings("ignore")  # neighbours have warnings of their own


def test_every_cell_has_a_row_and_none_fails() -> None:
    newest = newest_rows(run.TABLE)
    assert newest.keys() == set(itertools.product(BY_NAME, METHOD))
    told = {cell: row["note"] or row["error"] for cell, row in newest.items() if row["result"] == "differs"}
    assert told == {}
    assert all(row["note"] for row in newest.values() if row["result"] in ("refused", "not tried"))
    tried = {name for (name, _), row in newest.items() if row["result"] != "not tried"}
    assert tried == BY_NAME.keys() - {"Nunchaku", "set_attention_backend, xformers"}


@pytest.mark.parametrize(
    ("neighbour", "method"),
    [
        ("First Block Cache", "pattern"),
        ("SeaCache", "NAG"),
        ("LoRA, hot swap", "dense pattern"),
        ("bitsandbytes NF4", "pattern"),
        ("cache-dit, DBCache", "SoftPAG"),
        ("cache-dit, DBCache + TaylorSeer", "NAG"),
        ("SDNQ int8", "pattern"),
        ("set_attention_backend, _native_math", "SoftPAG"),
        ("fused projections", "NAG"),
        pytest.param("torchao fp8", "SoftPAG", marks=pytest.mark.slow),
        pytest.param("torch.compile, blocks", "pattern", marks=pytest.mark.slow),
        pytest.param("torch.compile, torch.compile(model)", "SoftPAG", marks=pytest.mark.slow),
        pytest.param("context parallel, Ulysses", "pattern", marks=pytest.mark.slow),
        pytest.param("context parallel, ring", "pattern", marks=pytest.mark.slow),
    ],
)
def test_cells_measured_now(neighbour: str, method: str) -> None:
    reason = why_not(BY_NAME[neighbour])
    if reason:
        pytest.skip(f"{neighbour}: {reason}")
    cell = measure(BY_NAME[neighbour], METHOD[method])
    assert cell.result in ("equal", "within"), cell


def scale_weights(by: float) -> Any:
    def scale(pipe: Any) -> None:
        pipe.transformer.blocks[0].ffn.net[2].weight.data.mul_(by)

    return scale


def test_a_neighbour_that_is_broken_by_us_is_told() -> None:
    turns = itertools.count()

    def never_the_same(pipe: Any) -> None:
        scale_weights(1.5 + 0.1 * next(turns))(pipe)

    cell = measure(Neighbour("broken", "weights", (never_the_same,)), METHOD["dense pattern"])
    assert cell.result == "differs"
    assert cell.error > 1e-4


def test_a_neighbour_or_method_without_effect_is_no_result() -> None:
    cell = measure(Neighbour("idle", "weights", (lambda pipe: None,)), METHOD["dense pattern"])
    assert (cell.result, cell.note) == ("differs", "the neighbour has no effect here, so the cell would tell nothing")

    def past_the_seam(pipe: Any) -> None:
        pipe.transformer.forward = lambda hidden_states, **rest: (hidden_states * 0.9,)

    cell = measure(Neighbour("past", "cache", (past_the_seam,)), METHOD["pattern"])
    assert (cell.result, cell.note) == ("differs", "the method has no effect beside it")


def test_a_refusal_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pipe: Any, zero: bool) -> Any:
        raise GenAttnError("it cannot be")

    cell = measure(Neighbour("any", "weights", (scale_weights(1.5),)), cells.Method("refusing", refuse))
    assert (cell.result, cell.note) == ("refused", "it cannot be")


def test_a_neighbour_without_code_for_this_machine_is_told() -> None:
    def refuse(pipe: Any) -> None:
        raise NotImplementedError("No operator found\nfor these inputs")

    cell = measure(Neighbour("cuda only", "backend", (refuse,)), METHOD["pattern"])
    assert (cell.result, cell.note) == ("not tried", "by itself it does not run on this machine: No operator found")


def test_of_several_processes_the_worst_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(measure: Any, neighbour: str, methods: list[str], processes: int) -> Any:
        assert processes == 2
        results = [("equal", 0.0), ("differs", 0.1)], [("within", 1e-7), ("within", 2e-7)]
        return [[asdict(Cell(neighbour, m, *of_one)) for m, of_one in zip(methods, process)] for process in results]

    monkeypatch.setattr(cells, "measure_together", together)
    row = cells.measure_row(Neighbour("split", "split", processes=2), METHODS[:2])
    assert [(cell.result, cell.error) for cell in row] == [("within", 1e-7), ("differs", 0.1)]


def test_what_is_close_counts_as_within(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = itertools.cycle([0.0, 3e-7])
    monkeypatch.setattr(cells, "_error", lambda got, wanted: next(errors))
    monkeypatch.setattr(cells, "_alone", lambda *given: torch.ones(1))
    monkeypatch.setattr(cells, "_run", lambda *given: (torch.zeros(1), torch.zeros(1)))
    for close, result in ((1e-6, "within"), (1e-7, "differs")):
        neighbour = Neighbour("close", "execution", (scale_weights(1.0),), close=close)
        assert measure(neighbour, METHOD["dense pattern"]) == Cell("close", "dense pattern", result, 3e-7)


def test_a_ring_has_the_log_sum_exp_that_it_asks_for() -> None:
    query, key, value = torch.randn(3, 2, 5, 3, 8).unbind()
    out, lse = neighbours._with_lse(None, query, key, value, None, 0.0, False, None, False, True, _save_ctx=False)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value))
    assert torch.equal(neighbours._with_lse(None, query, key, value), out)
    hidden = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0]).expand(2, 1, 5, 5)
    out, lse = neighbours._with_lse(None, query, key, value, hidden, scale=0.5, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * 0.5 + hidden[0, 0, 0]
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value))
    with pytest.raises(NotImplementedError, match="as many key heads as query heads"):
        neighbours._with_lse(None, query, key, value, enable_gqa=True)


def test_packages_that_are_not_there() -> None:
    absent = Neighbour("absent", "cache", package="no-such-package")
    assert measure(absent, METHODS[0]).note == "not installed (pip install no-such-package)"
    assert version_of(absent) == ""
    assert measure(BY_NAME["Nunchaku"], METHODS[0]).result == "not tried"


def test_the_command_writes_rows_and_tells_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    assert run.main(["--only", "nunch", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHOD)
    assert {row["result"] for row in rows} == {"not tried"}
    assert rows[0]["torch_version"] == torch.__version__
    monkeypatch.setattr(run, "measure_row", lambda n: [Cell(n.name, m, "differs", 0.5) for m in METHOD])
    assert run.main(["--only", "SeaCache", "--out", str(out)]) == 1
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing"])
    assert "--only must begin the name of a neighbour, got 'nothing'" in capsys.readouterr().err
