"""Whether the tests notice small mistakes: mutants drawn by seed, each run against the tests of its file.

    python -m genattn.apps.laboratory.mutation.run --seed 1 --log mutants.jsonl --root ../copy

Run it on a copy of the repository: files are changed in place and put back. A mutant is killed when a test fails. That test
is kept, so that `--check` can run it on the unchanged copy. A run over the time limit is undecided, neither kill nor survivor.
With `--coverage` and `--times` (covering.py says how they are recorded) a mutant meets the tests that run its line.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.laboratory.mutation.covering import Covering
from genattn.apps.laboratory.mutation.places import Mutant, Places
from genattn.errors import GenAttnError

TOPS = ("kernels", "genattn", "guidance", "pipelines", "apps")
# what measures and draws for this repository alone is not what users run
LEFT_OUT = ("apps/laboratory", "apps/pages", "apps/bench/gpu", "pipelines/tiny/studies", "pipelines/tiny/random")

# the tests that read the sources, and so run no line: of what stands there when a module is imported
_READING = "tests/test_defaults.py"
_QUICK = 10  # so many tests come first, and alone: most mutants end there, before the others are collected


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Every change of one file; a few of them do not compile."""
    source = (root / file).read_bytes()
    places = Places(file, source)
    places.visit(ast.parse(source))
    return places.found


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def files(root: Path) -> list[str]:
    """Every file of the product, in a fixed order."""
    found = sorted(str(path.relative_to(root)) for top in TOPS for path in (root / top).rglob("*.py"))
    return [file for file in found if not file.startswith(LEFT_OUT)]


def draw(root: Path, seed: int, count: int) -> list[Mutant]:
    """`count` mutants: the folders take turns, and within one a file counts by the number of its places."""
    generator = random.Random(seed)
    by_top = {top: [m for file in files(root) if file.split("/")[0] == top for m in mutants_of(root, file)] for top in TOPS}
    drawn: list[Mutant] = []
    while len(drawn) < count:
        mutant = generator.choice(by_top[TOPS[len(drawn) % len(TOPS)]])
        if _compiles(mutant.apply((root / mutant.file).read_bytes())):
            drawn.append(mutant)
    return drawn


def tests_for(root: Path, file: str) -> list[str]:
    """Tests of a file, nearest first: those of its name, those that import it, then its room's, or the room's around that."""
    path = Path(file)
    room = next(place for place in (root / "tests" / path).parents if place.is_dir())
    module = "genattn." + file.removeprefix("genattn/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    everything = sorted((root / "tests").rglob("test_*.py"))
    named = [test for test in everything if test.parent == room and path.stem in test.stem]
    wanted = re.compile(rf"\b{re.escape(module)}\b")
    importing = [test for test in everything if wanted.search(test.read_text())]
    beside = sorted(room.rglob("test_*.py"))
    return [str(test.relative_to(root)) for test in dict.fromkeys([*named, *importing, *beside])]


def run_tests(root: Path, tests: list[str], timeout: float) -> tuple[str, str]:
    """("passed" | "failed" | "timeout", the first failing test)."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    env = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timeout", ""
    if done.returncode == 0:
        return "passed", ""
    failing = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not failing and "ERROR: not found: " in done.stderr:
        raise GenAttnError(f"the record must be of these tests, got one of others; record it anew: {done.stderr[:300]}")
    return "failed", failing[0] if failing else done.stdout[-300:] + done.stderr[-300:]


def rounds_for(root: Path, mutant: Mutant, covering: Covering | None, seconds: float) -> list[list[str]]:
    """The tests of a mutant in two runs: a few that are quick, then the others."""
    nearest = tests_for(root, mutant.file)
    if covering is None:
        return [nearest]
    found, are_all = covering.tests(mutant)
    tests = covering.order(found, seconds, nearest)
    if not are_all and (root / _READING).is_file():
        tests.insert(0, _READING)
    if are_all:  # of the nearest, the tests whose lines the record cannot know
        nearest = [test for test in nearest if test not in covering.files or "subprocess" in (root / test).read_text()]
    return [tests[:_QUICK], [*tests[_QUICK:], *nearest]]


def judge(root: Path, mutant: Mutant, timeout: float, covering: Covering | None = None) -> dict[str, object]:
    """One mutant's row: put in, tested, taken out again."""
    path, begin = root / mutant.file, time.monotonic()
    source = path.read_bytes()
    rounds = rounds_for(root, mutant, covering, timeout / 2)
    outcome, by = "passed", ""
    try:
        path.write_bytes(mutant.apply(source))
        for tests in rounds:
            if tests and outcome == "passed":
                outcome, by = run_tests(root, tests, timeout)
    finally:
        path.write_bytes(source)
    verdict = {"passed": "survived", "failed": "killed", "timeout": "undecided"}[outcome]
    return asdict(mutant) | {"verdict": verdict, "by": by, "seconds": round(time.monotonic() - begin, 1)}


def _rows(log: Path) -> Iterator[dict[str, object]]:
    if log.is_file():
        yield from (json.loads(line) for line in log.read_text().splitlines())


def summary(rows: list[dict[str, object]]) -> dict[str, dict[str, int]]:
    """How many of each verdict, for each folder and in all."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in (str(row["file"]).split("/")[0], "all"):
            counts = table.setdefault(name, {})
            verdict = str(row["verdict"])
            counts[verdict] = counts.get(verdict, 0) + 1
    return table


def main(
    root: Annotated[Path, typer.Option(help="A copy of the repository; its files are changed and put back.")],
    log: Annotated[Path, typer.Option(help="One line of JSON for each mutant; a run goes on where it stopped.")],
    seed: Annotated[int, typer.Option(help="Which mutants are drawn.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the tests of one mutant.")] = 240.0,
    coverage: Annotated[Path | None, typer.Option(help="The suite's coverage with contexts: tests that run the line.")] = None,
    times: Annotated[Path | None, typer.Option(help="The same run's JUnit file, for the quick tests first.")] = None,
    check: Annotated[bool, typer.Option(help="Run the tests that killed on the unchanged copy instead.")] = False,
) -> None:
    """Draw, run and report."""
    root = root.resolve()
    if not (root / "pyproject.toml").is_file():
        raise GenAttnError(f"--root must be a copy of the repository, got {root}")
    if (coverage is None) != (times is None):
        raise GenAttnError(f"--coverage and --times come from one run and go together, got {coverage} and {times}")
    covering = Covering(root, coverage, times) if coverage and times else None
    known = list(_rows(log))
    if check:
        killers = sorted({str(row["by"]).split("[")[0] for row in known if row["verdict"] == "killed"})
        print(*run_tests(root, killers, timeout * 10))
        return
    for mutant in draw(root, seed, count)[len(known) :]:
        row = judge(root, mutant, timeout, covering)
        known.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            row["verdict"],
            f"{mutant.file}:{mutant.line}",
            mutant.kind,
            repr(mutant.old[:60]),
            "->",
            repr(mutant.new[:60]),
            flush=True,
        )
    print(json.dumps(summary(known)))


if __name__ == "__main__":
    typer.run(main)
