"""A stop at any event of writing: what stands there is whole, the exit code tells the signal, and the next run works."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genattn.apps.bench import attention as bench
from genattn.apps.bench.cases import AttentionCase
from genattn.apps.cli import root as cli
from genattn.apps.comfyui.install import install, pack_folder
from genattn.apps.sampling import compare as comparing
from genattn.apps.sampling.output_files import read_metadata
from genattn.apps.tuning import tune as tuning
from genattn.guidance.headhunter.hunter import HeadHunter
from genattn.guidance.heads.head_set import HeadSet
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.profiling import draw
from genattn.profiling.recorder import Recorder
from genattn.seam.settings_file import load_sparse
from genattn.selection.profile_map import read_map

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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders wan and sd3, each a whole pipeline with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan", "sd3"):
        build_pipeline(name)[0].save_pretrained(folder / name)
    (folder / "p.txt").write_text("a cat\na dog\n")
    return folder


WAN = "--model {models}/wan --frames 9 --height 64 --width 64 --steps 1 --guidance-scale 1 --device cpu"


@pytest.fixture
def finished(
    run: Callable[..., Run], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Callable[[int], Path]]]:
    """A command that ran to its end once; gives runs of it, and folders in which only what `lost` names is missing."""

    def of(line: str, lost: Sequence[str], room: Any, engine: str) -> tuple[Run, Callable[[int], Path]]:
        whole = tmp_path / "whole"
        whole.mkdir()
        again = run(line.replace("{models}", str(models)))
        assert again(whole, 0, 0)[0] == 0
        monkeypatch.setattr(room, engine, lambda *_, **__: pytest.fail("it was measured already"))

        def folder_of(at: int) -> Path:
            folder = tmp_path / str(at)
            shutil.copytree(whole, folder)
            for name in lost:
                (folder / name).unlink()
            return folder

        return again, folder_of

    return of


def test_tune_stopped_at_its_last_writes_measures_nothing_again(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tuning.run_once

    def timed(pipe: Any, call: Any, prompt: str, seed: int, setting: Any, title: str) -> Any:
        found = real(pipe, call, prompt, seed, setting, title)
        return found, 3.0 if setting.pattern is None else 1.0

    monkeypatch.setattr(tuning, "timed", timed)
    monkeypatch.setattr(tuning, "warm_up", lambda *_: None)
    line = f"tune {WAN} --steps 2 --prompt cat --prompt dog --budget 1x --try profiled --densities 0.5 --out {{folder}}"
    lost = ["settings.json", "front.png"]
    again, folder_of = finished(line, lost, tuning, "timed")
    left = "map.safetensors.part.safetensors"
    (tmp_path / "whole" / left).write_bytes(b"of a kill that came when the map had just been written")
    monkeypatch.setattr(tuning, "profile", lambda *_, **__: pytest.fail("the map is there"))

    def check(folder: Path, told: str) -> None:
        if (folder / "front.png").is_file():
            Image.open(folder / "front.png").load()
        if (folder / "settings.json").is_file():
            assert load_sparse(folder / "settings.json").pattern.path == str(folder / "map.safetensors")
        assert not told or told.endswith(f"the same command goes on from {folder / 'journal.jsonl'}")
        assert told or (not (folder / left).exists() and all((folder / name).is_file() for name in lost))

    assert at_every_event(again, folder_of, check) >= 5


def test_a_profile_stopped_at_its_picture_has_no_prompt_to_run_again(
    run: Callable[..., Run], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"profile {WAN} --prompts {{models}}/p.txt --out {{folder}}/m.safetensors --picture {{folder}}/m.png"
    again = run(line.replace("{models}", str(models)))
    real = draw.draw_profile

    def stopped(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "draw_profile", stopped)
    code, told, _ = again(tmp_path, 0, 0)
    assert (code, told) == (130, f"genattn: stopped; the same command goes on from {tmp_path}/m.safetensors.part.safetensors")
    assert read_map(tmp_path / "m.safetensors").header.prompts == 2
    whole = load_file(tmp_path / "m.safetensors")
    monkeypatch.setattr(draw, "draw_profile", real)
    monkeypatch.setattr(Recorder, "save", lambda *_: pytest.fail("both prompts were looked at"))
    assert again(tmp_path, 0, 0)[0] == 0
    again_made = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(again_made[name], tensor) for name, tensor in whole.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.png", "m.safetensors"]


def test_hunt_stopped_at_its_last_writes_tries_no_head_again(finished: Any) -> None:
    call = '{{"max_sequence_length":16}}'
    line = (
        f"hunt --model {{models}}/sd3 --height 16 --width 16 --steps 1 --device cpu --prompts {{models}}/p.txt --call {call} "
    )
    line += "--objective contrast --heads L1H0-1 --top-k 1 --log {folder}/log.jsonl --out {folder}/heads.json"
    again, folder_of = finished(line, ["heads.json"], HeadHunter, "evaluate")

    def check(folder: Path, told: str) -> None:
        if not told or (folder / "heads.json").exists():
            assert len(HeadSet.load(folder / "heads.json").heads) == 1
        assert not told or told.endswith(f"the same command goes on from {folder / 'log.jsonl'}")

    assert at_every_event(again, folder_of, check) >= 6


def test_compare_stopped_at_its_last_writes_adds_its_rows_once(
    finished: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def kept(path: Path, missing_ok: bool = False) -> None:
        if not path.name.endswith(".journal.jsonl"):
            unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", kept)
        again, folder_of = finished(
            f"compare {WAN} --prompt cat --attention radial@0 --out {{folder}}/c.csv", ["c.csv"], comparing, "run_once"
        )

    def check(folder: Path, told: str) -> None:
        assert [row["attention"] for row in rows_of(folder / "c.csv")] in ([], ["dense", "radial@0"])
        done = not told or told.endswith(f"the rows are in {folder / 'c.csv'}")
        assert done or "the same command goes on from" in told
        assert not done or len(rows_of(folder / "c.csv")) == 2
        if not (folder / "c.csv.journal.jsonl").is_file():  # all was done: who gives the command again measures again
            (folder / "c.csv.journal.jsonl").write_bytes((folder.parent / "whole" / "c.csv.journal.jsonl").read_bytes())

    assert at_every_event(again, folder_of, check) >= 6


def test_a_report_is_of_the_clip_beside_it(run: Callable[..., Run], models: Path, tmp_path: Path) -> None:
    line = f"generate {WAN} --attention dense --out {{folder}}/a.mp4 --prompt".replace("{models}", str(models))
    assert run(f"{line} cat")(tmp_path, 0, 0)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("a.mp4", "a.json")}

    def folder_of(at: int) -> Path:
        for name, content in before.items():
            (tmp_path / str(at)).mkdir(exist_ok=True)
            (tmp_path / str(at) / name).write_bytes(content)
        return tmp_path / str(at)

    seen: set[tuple[str, str]] = set()

    def check(folder: Path, told: str) -> None:
        clip = read_metadata(folder / "a.mp4")["prompt"]
        report = json.loads((folder / "a.json").read_text())["prompt"] if (folder / "a.json").is_file() else ""
        seen.add((clip, report))
        assert report in ("", clip), "the report of another clip stands beside this one"
        assert told or report == "dog"

    assert at_every_event(run(f"{line} dog"), folder_of, check) >= 5
    assert seen == {("cat", "cat"), ("dog", ""), ("dog", "dog")}


def test_the_node_pack_is_whole_or_as_before(tmp_path: Path, run: Callable[..., Run]) -> None:
    def folder_of(at: int) -> Path:
        nodes = tmp_path / str(at) / "custom_nodes"
        nodes.mkdir(parents=True)
        if at % 2:
            install(nodes)
        return tmp_path / str(at)

    wanted = sorted(file.name for file in pack_folder().rglob("*") if "__pycache__" not in str(file))

    def check(folder: Path, told: str) -> None:
        nodes = folder / "custom_nodes"
        assert {each.name for each in nodes.iterdir()} <= {"genattn", "genattn.new.disabled", "genattn.old.disabled"}
        if (nodes / "genattn").exists():
            assert sorted(file.name for file in (nodes / "genattn").rglob("*")) == wanted
        assert told or [each.name for each in nodes.iterdir()] == ["genattn"]

    assert at_every_event(run("comfyui install {folder}"), folder_of, check) >= 10
