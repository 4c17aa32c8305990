"""A stop at any event of writing: what stands there is whole, the exit code tells the signal, and the next run works."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from genattn.apps.bench import attention as bench
from genattn.apps.bench.cases import AttentionCase
from genattn.apps.cli import root as cli
from genattn.patterns.radial import RadialPattern

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Events:
    """What is opened for writing, moved, made or removed under a folder; at event number `at` comes a signal."""

    def __init__(self, folder: Path, at: int, number: int) -> None:
        self.folder, self.at, self.number, self.count = str(folder), at, number, 0

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
        writes = writes or (event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITES))
        if writes and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), self.number)


_watching: list[Events] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for watch in _watching:
        watch.see(event, arguments)


sys.addaudithook(_hook)  # there is no taking it away: it looks at nothing while nobody watches


@contextmanager
def watched(folder: Path, at: int, number: int) -> Iterator[Events]:
    _watching.append(Events(folder, at, number))
    try:
        yield _watching[-1]
    finally:
        _watching.clear()


Run = Callable[[Path, int, int], tuple[int, str, int]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hangup_is_heard: None) -> Callable[..., Run]:
    """For a command line the run of it that is stopped at an event: its exit code, its last line, and how many came."""

    def of(line: str) -> Run:
        def stopped(folder: Path, at: int, number: int) -> tuple[int, str, int]:
            monkeypatch.setattr(sys, "argv", ["genattn", *line.format(folder=folder).split()])
            with pytest.raises(SystemExit) as left, watched(folder, at, number) as events:
                cli.main()
            told = capsys.readouterr().err.splitlines()
            return int(left.value.code or 0), told[-1] if told else "", events.count

        return stopped

    return of


def at_every_event(run: Run, folders: Callable[[int], Path], check: Callable[[Path, str], None]) -> int:
    """Stops the command at each of its events in a folder of its own, and lets it run again there. Gives their number."""
    for at in itertools.count(1):
        folder = folders(at)
        number, wanted = STOPS[at % len(STOPS)]
        code, told, count = run(folder, at, number)
        if count < at:
            assert code == 0
            return at - 1
        assert code == wanted, f"event {at}: {told}"
        assert told.startswith("genattn: stopped"), f"event {at}"
        left = [file.name for file in folder.rglob("*") if file.name.endswith((".part", ".partial"))]
        assert left == [], f"event {at}"
        check(folder, told)
        assert run(folder, 0, 0)[0] == 0, f"event {at}"
        check(folder, "")
    raise AssertionError


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


TOY = [AttentionCase(name, (9, 8, 8), RadialPattern(), 5, 1, 16, torch.float32) for name in ("one", "two")]
BENCH = "bench attention --device cpu --rounds 1 --impl grouped --impl reference"


@pytest.fixture
def _toy_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cpu_cases", lambda quick: TOY)
    monkeypatch.setattr(bench, "matmul_flops", lambda *_: 1e9)


@pytest.mark.usefixtures("_toy_bench")
def test_a_stopped_benchmark_leaves_whole_cases_and_says_where(run: Callable[..., Run], tmp_path: Path) -> None:
    known: dict[Path, int] = {}

    def check(folder: Path, told: str) -> None:
        rows = rows_of(folder / "rows.csv")
        assert [row["impl"] for row in rows] == ["grouped", "reference"] * (len(rows) // 2)
        assert all(row["ratio"] and row["commit"] for row in rows)
        if (folder / "plot.png").is_file():
            Image.open(folder / "plot.png").load()
        if told:
            known[folder] = len(rows)
            assert (f"so far are in {folder / 'rows.csv'}, and the same command measures all of them again" in told) == bool(
                rows
            )
        else:
            assert len(rows) == known[folder] + 4, "the next run adds its rows"
            assert (folder / "plot.png").is_file()

    def folder_of(at: int) -> Path:
        (tmp_path / str(at)).mkdir()
        return tmp_path / str(at)

    line = BENCH + " --out {folder}/rows.csv --plot {folder}/plot.png"
    assert at_every_event(run(line), folder_of, check) >= 12
    assert set(known.values()) == {0, 2, 4}


KILLED = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("rows.csv") and os.path.exists(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
import torch
from genattn.apps.bench import attention as bench
from genattn.apps.bench.cases import AttentionCase
from genattn.patterns.radial import RadialPattern
from genattn.apps.cli import root
bench.cpu_cases = lambda quick: [AttentionCase(n, (9, 8, 8), RadialPattern(), 5, 1, 16, torch.float32) for n in ("one", "two")]
bench.matmul_flops = lambda *_: 1e9
sys.argv = ["genattn", *sys.argv[1:]]
root.main()
"""


@pytest.mark.usefixtures("_toy_bench")
def test_a_killed_benchmark_keeps_the_cases_before(run: Callable[..., Run], tmp_path: Path) -> None:
    line = BENCH + " --out {folder}/rows.csv"
    words = line.format(folder=tmp_path).split()
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["case"] for row in rows_of(tmp_path / "rows.csv")] == ["one", "one"]
    assert [file.suffix for file in tmp_path.glob(".*.part")] == [".part"]
    assert run(line)(tmp_path, 0, 0)[0] == 0
    assert [row["case"] for row in rows_of(tmp_path / "rows.csv")] == ["one"] * 4 + ["two"] * 2
    assert list(tmp_path.glob(".*.part")) == []


def test_a_stopped_autotune_says_what_it_keeps(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genattn.apps.bench import autotune as room

    monkeypatch.setenv("GENATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(room, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True), device=torch.device))
    monkeypatch.setattr(room, "arch_of", lambda device: "sm_90")
    table = tmp_path / "tune-chip.json"
    monkeypatch.setattr(room, "measured_table", lambda arch: table)
    monkeypatch.setattr(room, "tuning_cases", lambda head_dim: [head_dim])
    asked: list[int] = []

    def timer(head_dim: int, rounds: int) -> object:
        asked.append(head_dim)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr(room, "gpu_timer", timer)
    monkeypatch.setattr(room, "autotune", lambda *_, **__: {"dq": [4, 1, 1, 1]})
    code, told, _ = run("bench autotune --head-dim 64 --head-dim 128")(tmp_path, 0, 0)
    assert (code, told) == (
        130,
        f"genattn: stopped; what was found so far is in use from {table}, and the same command begins from it",
    )
    assert json.loads(table.read_text()) == {"64": {"dq": [4, 1, 1, 1]}}
