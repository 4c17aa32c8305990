"""Every command from the outside: exit codes, one line for what cannot be, JSON alone on standard output, examples that run."""

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from genattn.apps.cli import root as cli
from genattn.apps.sampling.output_files import write_image, write_video


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of `genattn WORDS`."""
    monkeypatch.setattr(sys, "argv", ["genattn", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def commands() -> dict[str, Any]:
    """Name -> click command of every command, subcommands as `bench attention`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


PROMISED = ("generate", "compare", "long", "hunt", "simulate", "plan", "show", "explain", "measure", "doctor", "app")


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_has_an_example_and_json(name: str) -> None:
    command = commands()[name]
    assert f"Example: genattn {name}" in command.help, "each command's help ends in an example"
    names = [option for parameter in command.params for option in parameter.opts]
    words = shlex.split(command.help.split("Example: genattn ", 1)[1])
    assert all(word in names for word in words if word.startswith("--")), "the example uses options that there are"
    assert "--json" in names or name in ("app",), "an app serves until it is stopped"


def test_promised_commands_are_there() -> None:
    assert set(PROMISED) | {"bench attention", "comfyui install"} <= set(commands())


CHEAP = ("simulate", "plan", "show", "explain", "doctor")


@pytest.mark.parametrize("name", CHEAP)
def test_examples_run_and_json_stands_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(commands()[name].help.split("Example: genattn ", 1)[1])
    assert run(monkeypatch, *words) == 0
    assert capsys.readouterr().out.strip()
    assert run(monkeypatch, *words, "--json") == 0
    json.loads(capsys.readouterr().out)


BAD = [
    ("frobnicate", "No such command 'frobnicate'; see: genattn --help"),
    ("generate", "generate needs something to show; give --prompt or a --prompts file"),
    ("generate --prompt a --steps x", "Invalid value for '--steps'"),
    ("generate --prompt a --steps 0", "--steps must be >= 1, got 0"),
    ("generate --prompt a --attention foo", "--attention must be one of auto, dense, radial"),
    ("generate --prompt a --pattern-options [1]", "--pattern-options must be a JSON object"),
    ('generate --prompt a --pattern-options {"decay":-1}', "decay must"),
    ("generate --prompt a --pattern-file none.json", "--settings must name a file"),
    ("generate --prompt a --settings none.json", "--settings must name a file"),
    ("generate --prompt a --settings none.json --window 3x3", "got --window beside it"),
    ("tune --prompt a", "tune needs a goal"),
    ("tune --budget 2x", "tune needs at least one prompt"),
    ("tune --prompt a --budget fast", "--budget must be a number of times as fast as dense"),
    ("tune --prompt a --budget 0.5x", "at least 1x, got 0.5x"),
    ("tune --prompt a --min-psnr -3", "--min-psnr must be a number of dB >= 0"),
    ("tune --prompt a --min-oracle 2", "--min-oracle must be a share"),
    ("tune --prompt a --min-oracle 0.9", "--min-oracle needs captions of the tiny world, got 'a'"),
    ("tune --prompt a --budget 2 --try best", "--try must be among window, gna, radial, adaptive, profiled, got best"),
    ("tune --prompt a --budget 2 --densities x", "--densities must be numbers"),
    ("tune --prompt a --budget 2 --densities 1.5", "--densities must be shares of the scores"),
    ("tune --prompt a --budget 2 --map none.safetensors", "there is no 'none.safetensors'"),
    ("tune --prompt a --budget 2 --frames 10", "nearest: 9 or 13"),
    ("tune --prompt a --budget 2 --out text.mp4", "--out must be a folder to write into"),
    ("generate --prompt a --dense-steps -1", "--dense-steps must be a share below 1 or a whole number"),
    ("generate --prompt a --model nowhere", "there is no folder 'nowhere'"),
    ("generate --prompt a --device tpu", "device must be one of"),
    ("generate --prompt a --dtype int3", "dtype must be auto"),
    ("generate --prompt a --out a.avi", "--out must end in .mp4"),
    ("generate --prompt a --frames 10", "nearest: 9 or 13"),
    ("compare", "compare needs at least one prompt"),
    ("compare --prompt a --attention radial@x", "--attention must be NAME or NAME@DENSE_STEPS"),
    ("compare --prompts none.txt", "--prompts must be a readable text file"),
    ("compare --prompt a --out a.txt", "--out must end in .csv"),
    ("explain --attention dense", "dense attention has none"),
    ("measure none.mp4", "'none.mp4' is no file"),
    ("measure text.mp4", "'text.mp4' cannot be read"),
    ("measure text.png", "'text.png' cannot be read"),
    ("measure text.mp4 --fps 0", "--fps must be > 0"),
    ("long", "--prompt must say what to show"),
    ("long --prompt a --folder text.mp4", "must be a folder to write into"),
    ("long --prompt a --fps -2", "--fps must lie in (0, 240]"),
    ("long --prompt a --frames 0", "--frames must be >= 1"),
    ("long --prompt a --partitions 0", "partitions"),
    ("long --prompt a --latents-per-level 0", "latents_per_level"),
    ("long --prompt a --uniform-steps -1", "uniform_steps must be >= 0"),
    ("long --prompt a --height 65", "height"),
    ("long --resume .", "'.' has no checkpoint.json"),
    *[
        (
            f"long --resume run {words}",
            f"a resumed run keeps its settings, got {words.split()[0].replace('--no-', '--')} beside",
        )
        for words in (
            "--seed 5",
            "--seed 0",
            "--fps 30",
            "--partitions 8",
            "--no-lookahead",
            "--latents-per-level 4",
            "--uniform-steps 4",
            "--drift-correction 0.5",
            "--ouroboros",
            "--prompt-fade 8",
            "--folder else",
            "--prompt a",
            "--height 64",
            "--steps 8",
        )
    ],
    ("hunt --prompts none.txt --objective contrast", "--prompts must be a readable text file"),
    ("hunt --prompts prompts.txt --objective nonsense", "objective must be one of"),
    ("hunt --prompts prompts.txt --objective contrast --tune-u a", "--tune-u must be numbers"),
    ("hunt --prompts prompts.txt --objective contrast --out heads.txt", "--out must end in .json"),
    ("hunt --prompts prompts.txt --objective contrast --log log.txt", "--log must end in .jsonl"),
    ("simulate --grid 3 --window x", "--window must be 1 to 3 whole numbers"),
    ("simulate --grid 8x8 --window 4x4x4", "window"),
    ("simulate --grid 8x8 --window 4x4 --stride 9", "stride"),
    ("simulate --grid 0x8 --window 4x4", "grid"),
    ("simulate --grid 8x8 --window 4x4 --attention-share 2", "Invalid value for '--attention-share'"),
    ("plan --model nonsense", "model must be a pipeline folder or one of"),
    ("plan --size 720", "--size must be HEIGHTxWIDTH"),
    ("plan --target-density 0", "density"),
    ("plan --frames 0", "frames"),
    ("show --grid 8x8x8x8", "--grid must be 1 to 3 whole numbers"),
    ("show --grid 0x8x8", "grid"),
    ("show --grid 4x8x8 --block 0", "block"),
    ("show --grid 4x8x8 --query 9x9x9 --out a.png", "query"),
    ("show --grid 4x8x8 --out a.txt", "--out must end in .png"),
    ("show --grid 4x8x8 --text-after -1", "text"),
    ("bench attention --impl nonsense", "nonsense"),
    ("bench attention --rounds 0", "rounds"),
    ("doctor --head-dim 0", "--head-dim must be >= 1"),
    ("finetune --data '' --out a", "--data must not be empty; write . for the current folder"),
    ("long --prompt a --folder=", "--folder must not be empty"),
    ("generate --prompt a -o ''", "-o must not be empty"),
    ("comfyui install ''", "an argument must not be empty"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_one_line(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.json").write_text("{}")
    assert run(monkeypatch, *shlex.split(line.replace('"', '\\"'))) == 2
    told = capsys.readouterr()
    last = told.err.strip().splitlines()[-1]
    assert last.startswith("genattn: ")
    assert message in last
    assert told.err.count("genattn: ") == 1
    assert told.out == ""


def test_no_command_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 2
    assert "generate" in capsys.readouterr().out


def test_interrupts_and_closed_pipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> Any:
        def app(**_: object) -> None:
            raise error

        return app

    monkeypatch.setattr(cli, "app", raises(KeyboardInterrupt()))
    assert run(monkeypatch) == 130
    assert capsys.readouterr().err == "genattn: stopped; no unfinished file was left\n"
    monkeypatch.setattr(cli, "app", raises(BrokenPipeError()))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run(monkeypatch) == 0


def test_measure_tells_what_a_file_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", clip, 8, {"prompt": "a cat", "seed": 7})
    for name in ("a.png", "a.jpg", "a.webp"):
        write_image(tmp_path / name, clip[0], {"prompt": "a cat", "seed": 7})
    for name in ("a.mp4", "a.png", "a.jpg", "a.webp"):
        assert run(monkeypatch, "measure", str(tmp_path / name), "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metadata"] == {"prompt": "a cat", "seed": 7}
        assert "contrast" in found or "temporal_flickering" in found
    assert run(monkeypatch, "measure", str(tmp_path / "a.png")) == 0
    assert "made with: prompt a cat, seed 7" in capsys.readouterr().out
