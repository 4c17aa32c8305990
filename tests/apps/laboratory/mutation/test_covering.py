"""A mutant meets the tests that run its line, as one recorded run of the suite tells."""

import subprocess
import sys
from pathlib import Path

import pytest

from genattn.apps.laboratory.mutation import run
from genattn.apps.laboratory.mutation.covering import Covering
from genattn.apps.laboratory.mutation.places import Mutant

pytest.importorskip("pytest_cov", reason="the record is pytest-cov's; pip install pytest-cov")

SOURCE = """LIMIT = 3
OTHER = {"twice": lambda a: a * 2}


def low(
    a: int,
    by: int = 1,
) -> int:
    if a > LIMIT:
        # too high
        a -= by
    return a


def high(a: int) -> int:
    return a + 10


class Kind:
    size: int = 4

    def grown(self) -> int:
        return self.size + 1
"""

TESTS = """import time

from guidance.f import OTHER, Kind, high, low


def test_above() -> None:
    time.sleep(0.2)
    assert low(5) == 4


def test_below() -> None:
    assert low(1) == 1


def test_high() -> None:
    assert high(1) == 11


def test_kind() -> None:
    assert Kind().grown() == 5


def test_twice() -> None:
    assert OTHER["twice"](2) == 4
"""


@pytest.fixture(scope="module", params=["", "[tool.coverage.run]\nrelative_files = true\n"], ids=["absolute", "relative"])
def recorded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Covering:
    root = tmp_path_factory.mktemp("copy")
    (root / "pyproject.toml").write_text(request.param)
    for name, text in {"guidance/f.py": SOURCE, "tests/far/test_low.py": TESTS, "tests/guidance/test_f.py": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    options = "--cov=guidance --cov-context=test --cov-report= --junitxml=times.xml -o junit_family=xunit1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *options.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return Covering(root, root / ".coverage", root / "times.xml")


def _mutant(line: int) -> Mutant:
    return Mutant("guidance/f.py", line, 0, 0, "", "", "constant")


@pytest.mark.parametrize(
    ("line", "names", "are_all"),
    [
        (9, ["below", "above"], True),  # the branch is asked by both, taken by one
        (11, ["above"], True),
        (16, ["high"], True),
        (7, ["below", "above"], False),  # a default: whoever runs the function
        (1, ["below", "above"], False),  # a constant: whoever runs a line with its name
        (20, ["kind"], False),  # a field: the same
        (2, ["twice"], False),  # a table of functions: whoever runs them
    ],
)
def test_the_tests_of_a_line(recorded: Covering, line: int, names: list[str], are_all: bool) -> None:
    found, all_of_them = recorded.tests(_mutant(line))
    asked = found if line != 2 else {test for test in found if "twice" in test}
    assert (recorded.order(asked, 60), all_of_them) == ([f"tests/far/test_low.py::test_{name}" for name in names], are_all)


def test_files_take_turns_and_the_seconds_are_a_limit(recorded: Covering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "seconds", {"a::1": 1.0, "a::2": 2.0, "b::3": 5.0, "b::4": 30.0})
    assert recorded.order(["b::4", "b::3", "a::2", "a::1"], 60) == ["a::1", "b::3", "a::2", "b::4"]
    assert recorded.order(["b::4", "b::3", "a::2", "a::1"], 60, ["b"]) == ["b::3", "a::1", "b::4", "a::2"], "what is near"
    assert recorded.order(["b::4", "b::3", "a::2", "a::1"], 7) == ["a::1", "b::3"]


def test_of_the_nearest_only_what_the_record_does_not_know(recorded: Covering) -> None:
    """tests/guidance/test_f.py holds no test that was recorded; of far tests, those that run the line."""
    rounds = run.rounds_for(recorded.root, _mutant(16), recorded, 60)
    assert rounds == [["tests/far/test_low.py::test_high"], ["tests/guidance/test_f.py"]]
    assert run.rounds_for(recorded.root, _mutant(16), None, 60) == [["tests/guidance/test_f.py"]]


def test_a_mutant_is_killed_from_afar(recorded: Covering) -> None:
    (wrong,) = [mutant for mutant in run.mutants_of(recorded.root, "guidance/f.py") if mutant.line == 16 and mutant.old == "+"]
    row = run.judge(recorded.root, wrong, 60, recorded)
    assert (row["verdict"], row["by"]) == ("killed", "tests/far/test_low.py::test_high")


def test_a_test_that_is_gone_is_no_kill(recorded: Covering) -> None:
    with pytest.raises(run.GenAttnError, match="record it anew: ERROR: not found: .*test_low.py::test_gone"):
        run.run_tests(recorded.root, ["tests/far/test_low.py::test_gone"], 60)


def test_a_record_of_another_copy_is_refused(recorded: Covering, tmp_path: Path) -> None:
    with pytest.raises(run.GenAttnError, match=r"the record must be of .*, got one without a file of it: .*\.coverage"):
        Covering(tmp_path, recorded.root / ".coverage", recorded.root / "times.xml")


def test_a_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    with pytest.raises(run.GenAttnError, match=r"must be files that a recorded run of pytest wrote, got .*\.coverage"):
        Covering(tmp_path, tmp_path / ".coverage", tmp_path / "times.xml")
    with pytest.raises(run.GenAttnError, match="--coverage and --times come from one run and go together"):
        run.main(tmp_path, tmp_path / "log", times=tmp_path / "times.xml")
