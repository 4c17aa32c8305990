"""Drawn bad arguments in every command: one line and exit code 2, or a result; never a traceback, never a hang."""

import contextlib
import random
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import typer

from genattn.apps.cli import root as cli
from genattn.errors import GenAttnError

# what a command is given beside the drawn argument, so that it comes as far as it can
LINES = {
    "generate": "--prompt a",
    "compare": "--prompt a",
    "explain": "",
    "measure": "text.mp4",
    "long": "--prompt a --frames 9 --folder film",
    "profile": "--prompts prompts.txt --out map.safetensors",
    "tune": "--prompt a --budget 1.5x --out tuned",
    "hunt": "--prompts prompts.txt --objective contrast",
    "finetune": "--data folder",
    "simulate": "--grid 4x8x8 --window 2x4x4",
    "plan": "--model wan-14b",
    "show": "--grid 4x8x8",
    "doctor": "",
    "app": "",
    "bench attention": "",
    "bench autotune": "",
    "comfyui install": "folder",
    "comfyui remove": "folder",
    "comfyui workflows": "",
    "comfyui help-pages": "",
}
WORDS = [
    "", " ", "x", "-1", "0", "1", "2.5", "-0.0", "nan", "inf", "-inf", "1e400", "999999999999999999999",
    "0x10", "true", "äöü 猫 🐈", "'", "a" * 300, "../..", "/", ".", "~", "folder", "none/none", "none.json",
    "text.mp4", "bad.json", "deep.json", "binary.png", "binary.json", "binary.safetensors", "prompts.txt",
    "empty.txt", "latin.txt", "[]", "{}", '{"decay"', "decay=x", "decay=", "=", "8x8", "8x8x8x8", "0x0x0",
    "-1x8x8", "8x", "x8", "L1H1", "L99H99", "L-1", "L1H1:9", "neighborhood:", "radial@",
    "neighborhood:4x4/9", "radial@-1", "radial@1e9", "dense", "cuda:99", "meta", "out.png/a.png", "a/b",
    "http://127.0.0.1:9/x", "0:'a' 5", '5:"a" 5:"b"', '-5:"a"', "sharpness:", "palette:none.png",
    "os:system", "a.b.c:d", "::", ",", "1,2,x",
]  # fmt: skip
DRAWS, SECONDS = 40, 300


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


def test_every_command_is_drawn_from() -> None:
    assert set(LINES) | {"evidence"} == set(commands()), "evidence only reads this repository's own tables"


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _reached(*_: object, **__: object) -> Any:
    raise GenAttnError("the work itself was reached")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of every bad kind, and commands that stop where weights would be read or work begin."""
    import genattn.apps.bench.attention
    import genattn.apps.webui.app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", _reached)
    monkeypatch.setattr(genattn.apps.webui.app, "serve", _reached)
    monkeypatch.setattr(genattn.apps.bench.attention, "bench_attention", _reached)
    (tmp_path / "folder").mkdir()
    (tmp_path / "out.png").write_text("no folder")
    for name in ("text.mp4", "prompts.txt"):
        (tmp_path / name).write_text("a red circle\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("ein Bär\n".encode("latin-1"))
    (tmp_path / "bad.json").write_text('{"a": [1, ')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("binary.png", "binary.json", "binary.safetensors"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 4)
    return tmp_path


def _drawn(generator: random.Random, command: Any, line: str) -> list[str]:
    """The command's usual words with one to three options drawn, some of them twice."""
    parameters = [p for p in command.params if p.name not in ("help",)]
    words = shlex.split(line)
    for _ in range(generator.randint(1, 3)):
        parameter = generator.choice(parameters)
        flag = generator.choice([*parameter.opts, *parameter.secondary_opts])
        if not flag.startswith("-"):
            words = [generator.choice(WORDS), *words[1:]]
        elif getattr(parameter, "is_flag", False):
            words.append(flag)
        else:
            words += [flag, generator.choice(WORDS)]
    return words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LINES)
def test_drawn_arguments(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generator, command = random.Random(name), commands()[name]
    for _ in range(DRAWS):
        words = [*name.split(), *_drawn(generator, command, LINES[name])]
        monkeypatch.setattr(sys, "argv", ["genattn", *words])
        try:
            with limited(SECONDS), pytest.raises(SystemExit) as stopped:
                cli.main()
        except BaseException as error:
            raise AssertionError(f"{shlex.join(words)} ends in {type(error).__name__}: {error}") from error
        told = capsys.readouterr()
        assert stopped.value.code in (0, 2, None), f"{shlex.join(words)} ends with {stopped.value.code}: {told.err[-300:]}"
        if stopped.value.code == 2:
            last = told.err.strip().splitlines()[-1]
            assert last.startswith("genattn: "), f"{shlex.join(words)} says {last!r}"
            assert "Traceback" not in told.err
            assert told.out == "", f"{shlex.join(words)} prints before it refuses"
