"""Mutants are small, fit their place, and find their tests; a copy comes back as it was."""

import ast
from pathlib import Path

import pytest

from genattn.apps.laboratory.mutation import run
from genattn.apps.laboratory.mutation.places import Places

SOURCE = b'''"""Words 1 < 2."""


def f(a: int = 3, flag: bool = True) -> list[int]:
    if a < 2 and flag:
        raise ValueError(f"{a + 1} no")
    b = max(a - 1, a)  # \xc3\xa9
    a += 1
    print(b)
    return [b][1:] if not flag else [a // 2]
'''


def _mutants() -> set[tuple[str, str]]:
    places = Places("f.py", SOURCE)
    places.visit(ast.parse(SOURCE))
    for mutant in places.found:
        assert SOURCE[mutant.start : mutant.end].decode() == mutant.old
        assert mutant.apply(SOURCE) != SOURCE
    return {(mutant.old, mutant.new) for mutant in places.found}


def test_every_kind_is_found_and_words_are_left_alone() -> None:
    found = _mutants()
    assert {("<", "<="), ("and", "or"), ("3", "4"), ("True", "False"), ("-", "+"), ("//", "/"), ("max", "min")} <= found
    assert {("a - 1, a", "a, a - 1"), ("a += 1", "pass"), ("print(b)", "pass"), ("[1:]", "[:]"), ("not ", "")} <= found
    assert ('raise ValueError(f"{a + 1} no")', "pass") in found
    assert ("+", "-") not in found, "the words of an error are no behaviour"


def _copy(root: Path) -> Path:
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for top in run.TOPS:
        (root / top).mkdir()
    (root / "guidance" / "f.py").write_bytes(SOURCE)
    (root / "tests" / "guidance").mkdir(parents=True)
    return root


def test_verdicts(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    test = root / "tests" / "guidance" / "test_f.py"
    test.write_text("from guidance.f import f\n\n\ndef test_f() -> None:\n    assert f(5) == [3]\n")
    assert run.tests_for(root, "guidance/f.py") == ["tests/guidance/test_f.py"]
    assert run.tests_for(root, "guidance/inner/g.py") == ["tests/guidance/test_f.py"], "a room without tests of its own"
    (half,) = [mutant for mutant in run.mutants_of(root, "guidance/f.py") if mutant.old == "//"]
    (printed,) = [mutant for mutant in run.mutants_of(root, "guidance/f.py") if mutant.old == "print(b)"]
    assert run.judge(root, printed, 60)["verdict"] == "survived"
    # 6 // 2 and 6 / 2 are equal, so it takes another number to tell them apart
    assert run.judge(root, half, 60)["verdict"] == "survived"
    test.write_text("from guidance.f import f\n\n\ndef test_f() -> None:\n    assert f(6) == [3]\n")
    row = run.judge(root, half, 60)
    assert (row["verdict"], row["by"]) == ("killed", "tests/guidance/test_f.py::test_f")
    assert (root / "guidance" / "f.py").read_bytes() == SOURCE
    assert run.summary([row, {**row, "verdict": "survived"}])["all"] == {"killed": 1, "survived": 1}


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    for top in run.TOPS:
        (root / top / "f.py").write_bytes(SOURCE)
    drawn = run.draw(root, 3, 10)
    assert drawn == run.draw(root, 3, 10) != run.draw(root, 4, 10)
    assert [mutant.file.split("/")[0] for mutant in drawn] == list(run.TOPS) * 2
    for mutant in drawn:
        compile(mutant.apply(SOURCE), "f", "exec")


def test_a_folder_that_is_no_copy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(run.GenAttnError, match="must be a copy of the repository"):
        run.main(tmp_path, tmp_path / "log")
