"""Which tests can notice a change of a line: those that run it, read from one recorded run of the suite.

    pytest --cov --cov-context=test --cov-report= --junitxml=times.xml -o junit_family=xunit1

A line that runs at import is run by no test of its own; there it is the tests that run a function which uses its name.
"""

import ast
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from genattn.apps.laboratory.mutation.places import Mutant
from genattn.errors import GenAttnError

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Covering:
    """The recorded run: a test is its pytest id, with the seconds it took."""

    def __init__(self, root: Path, coverage: Path, times: Path) -> None:
        try:
            from coverage import CoverageData
        except ImportError:
            raise GenAttnError("--coverage needs the package coverage, which is missing; pip install pytest-cov") from None
        for path in (coverage, times):
            if not path.is_file():
                raise GenAttnError(f"--coverage and --times must be files that a recorded run of pytest wrote, got {path}")
        self.root = root
        self._data = CoverageData(str(coverage))
        self._data.read()
        self._prefix = self._before_names(coverage)
        cases = ElementTree.parse(times).iter("testcase")
        self.seconds = {f"{case.get('file')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}

    def _before_names(self, coverage: Path) -> str:
        """What the record writes before a file's name: nothing, or the folder of a run that was not told `relative_files`."""
        measured, folder = self._data.measured_files(), f"{self.root.resolve()}/"
        if any(name.startswith(folder) for name in measured):
            return folder
        if any((self.root / name).is_file() for name in measured if not Path(name).is_absolute()):
            return ""
        raise GenAttnError(f"the record must be of {self.root}, got one without a file of it: {coverage}; record it there")

    @cached_property
    def files(self) -> frozenset[str]:
        """The test files that the run has met."""
        return frozenset(test.split("::")[0] for test in self.seconds)

    def running(self, file: str, lines: Iterable[int]) -> set[str]:
        """The tests that run one of a file's lines."""
        by_line = self._data.contexts_by_lineno(self._prefix + file)
        return {name.rsplit("|", 1)[0] for line in lines for name in by_line.get(line, ()) if name}

    def tests(self, mutant: Mutant) -> tuple[set[str], bool]:
        """The tests that may notice a mutant, and whether they are all that can: so it is of a line that they run."""
        tree = ast.parse((self.root / mutant.file).read_bytes())
        inside = _lines_of_functions(tree)
        statement = _statement(tree, mutant.line)
        lines = _own_lines(statement)
        if lines & inside:
            return self.running(mutant.file, lines & inside), True
        if isinstance(statement, _FUNCTIONS):  # a default or a decorator: whoever runs the function
            users = self.running(mutant.file, _span(statement.body))
        else:
            users = self._users(mutant.file, inside, _names(statement))
        return users | self.running(mutant.file, lines), False  # the lines themselves: a lambda may stand there

    def _users(self, file: str, inside: set[int], names: list[str]) -> set[str]:
        """Tests that run a line of a function of this file with one of the names in it, else any of its functions."""
        wanted = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
        lines = (self.root / file).read_text().splitlines()
        return self.running(file, [n for n in inside if wanted.search(lines[n - 1])]) or self.running(file, inside)

    def order(self, tests: Iterable[str], seconds: float, near: Collection[str] = ()) -> list[str]:
        """Quick ones first and the test files by turns, those that are near before others, as many as the seconds allow."""
        turn: dict[str, int] = {}
        placed: list[tuple[int, bool, int, str]] = []
        for test in sorted(tests, key=lambda test: (self.seconds.get(test, 0.0), test)):
            file = test.split("::")[0]
            turn[file] = turn.get(file, -1) + 1
            placed.append((turn[file], file not in near, len(placed), test))
        kept: list[str] = []
        for *_, test in sorted(placed):
            took = self.seconds.get(test, 0.0)
            if took <= seconds:
                kept.append(test)
                seconds -= took
        return kept


def _lines_of_functions(tree: ast.Module) -> set[int]:
    """Lines that run when a function is called, not when its module is imported."""
    return {line for node in ast.walk(tree) if isinstance(node, _FUNCTIONS) for line in _span(node.body)}


def _span(statements: list[ast.stmt]) -> range:
    return range(_first(statements[0]), (statements[-1].end_lineno or 0) + 1)


def _statement(tree: ast.Module, line: int) -> ast.stmt:
    """The innermost statement around a line."""
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _first(n) <= line <= (n.end_lineno or 0)]
    return max(around, key=lambda node: (_first(node), -(node.end_lineno or 0)))


def _first(statement: ast.stmt) -> int:
    return min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])


def _own_lines(statement: ast.stmt) -> set[int]:
    """A statement's lines down to the first that it holds, of a function or a branch its head alone."""
    body = getattr(statement, "body", None)
    end = max(_first(body[0]), statement.lineno + 1) if body else (statement.end_lineno or 0) + 1
    return set(range(_first(statement), end))


def _names(statement: ast.stmt) -> list[str]:
    """What a statement of a module or a class defines."""
    if isinstance(statement, ast.ClassDef):
        return [statement.name]
    stored = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [node.id for node in stored]
