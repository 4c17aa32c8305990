"""One meaning of an exit code in every command, clean standard error, and completion."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from typer.models import CommandInfo

from genattn.apps.cli import root as cli, stopping
from genattn.apps.sampling.run import SamplingSettings
from genattn.errors import GenAttnError, RunFailed


def commands() -> dict[str, CommandInfo]:
    """Every command by its words; what typer calls for it may be changed."""
    found = {str(info.name): info for info in cli.app.registered_commands}
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        found |= {f"{group.name} {info.name}": info for info in group.typer_instance.registered_commands}
    return found


NAMES = sorted(commands())


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command of which only the name is left: it does `work`. Gives its exit code and standard error."""

    def run(name: str, work: Callable[[], Any], *words: str) -> tuple[int, str]:
        def command() -> None:
            work()

        monkeypatch.setattr(commands()[name], "callback", command)
        monkeypatch.setattr(sys, "argv", ["genattn", *name.split(), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.usefixtures("hangup_is_heard")
@pytest.mark.parametrize("name", NAMES)
def test_one_meaning_everywhere(name: str, outcome: Callable[..., tuple[int, str]]) -> None:
    assert outcome(name, lambda: None) == (0, "")
    assert outcome(name, raising(RunFailed("it went wrong"))) == (1, "genattn: it went wrong\n")
    assert outcome(name, raising(GenAttnError("it cannot be"))) == (2, "genattn: it cannot be\n")
    assert outcome(name, raising(OSError(errno.ENOSPC, "No space left on device")))[0] == 1
    assert outcome(name, raising(OSError(errno.ENOTDIR, "Not a directory", "a/b"))) == (2, "genattn: 'a/b': Not a directory\n")
    code, told = outcome(name, raising(OutOfMemoryError("CUDA out of memory.\nTried to allocate")))
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith("genattn: out of memory: CUDA out of memory.; try")
    assert ("--grid" in told) == (name in ("show", "simulate")) == ("--cpu-offload" not in told)
    assert outcome(name, raising(MemoryError()))[0] == 1
    code, told = outcome(name, lambda: None, "--no-such-option")
    assert (code, told.count("\n")) == (2, 1)
    assert f"see: genattn {name} --help" in told
    assert outcome(name, raising(KeyboardInterrupt()))[0] == 130
    assert outcome(name, raising(typer.Abort()))[0] == 130
    for number, wanted in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        before = signal.getsignal(number)
        code, told = outcome(name, partial(os.kill, os.getpid(), number))
        assert (code, told) == (wanted, "genattn: stopped; no unfinished file was left\n")
        assert signal.getsignal(number) is before
    assert outcome(name, raising(KeyboardInterrupt()))[0] == 130, "the next one is no longer a SIGTERM"


def test_an_interrupt_is_heeded_that_a_shell_script_has_ignored(outcome: Callable[..., tuple[int, str]]) -> None:
    """Shells start what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert outcome("doctor", lambda: os.kill(os.getpid(), signal.SIGINT))[0] == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_long_video_says_how_to_go_on(tmp_path: Path) -> None:
    from genattn.apps.cli.long import _how_to_go_on

    plain = SamplingSettings()
    assert "nothing to resume yet, the same command begins anew" in _how_to_go_on(tmp_path, plain)
    (tmp_path / "checkpoint.json").write_text("{}")
    assert _how_to_go_on(tmp_path, plain).endswith(f"genattn long --resume {tmp_path}")
    told = _how_to_go_on(tmp_path, SamplingSettings("my model", lora=("owner/name:0.5",), device="cpu", dtype="bfloat16"))
    assert told.endswith(
        f"genattn long --resume {tmp_path} --model 'my model' --device cpu --dtype bfloat16 --lora=owner/name:0.5"
    )


@pytest.mark.parametrize("name", ["hunt", "profile"])
def test_a_stopped_command_whose_work_is_kept_says_how_to_go_on(
    name: str, outcome: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    kept = tmp_path / "h.jsonl"

    def work() -> NoReturn:
        stopping.same_command_goes_on(kept)
        raise KeyboardInterrupt

    assert outcome(name, work) == (130, "genattn: stopped; no unfinished file was left\n")
    kept.write_text("{}")
    assert outcome(name, work) == (130, f"genattn: stopped; the same command goes on from {kept}\n")


_OPENED = "genattn.apps.sampling.run.open_pipeline"


@pytest.mark.parametrize(
    ("line", "kept", "interrupted_in"),
    [
        ("profile --prompts p.txt --out map.safetensors", "map.safetensors.part.safetensors", _OPENED),
        ("hunt --prompts p.txt --objective contrast --log h.jsonl --out h.json", "h.jsonl", _OPENED),
        ("compare --prompts p.txt --out c.csv", "c.csv.journal.jsonl", "genattn.apps.tuning.journal.Journal"),
        ("tune --prompts p.txt --budget 2x --out t", "t/journal.jsonl", "genattn.apps.tuning.tune.tune"),
        ("finetune --data . --out f", "f/training.safetensors", "genattn.pipelines.finetune.data.find_clips"),
    ],
)
def test_a_command_keeps_its_work_where_it_says(
    line: str,
    kept: str,
    interrupted_in: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")

    def interrupted(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted_in, interrupted)
    monkeypatch.setattr(sys, "argv", ["genattn", *line.split()])
    for told in ("no unfinished file was left", f"the same command goes on from {kept}"):
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code, line_told = stopped.value.code, capsys.readouterr().err.splitlines()[-1]
        assert (code, line_told) == (130, f"genattn: stopped; {told}")
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).write_text('{"request": {}}')


def test_a_film_with_a_lora_is_resumed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.apps.cli import long

    (tmp_path / "checkpoint.json").write_text("{}")
    monkeypatch.setattr(long, "_given", lambda context: {"resume", "lora", "model"})
    long._check_long(None, "", tmp_path, tmp_path, None)  # type: ignore[arg-type]


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands()["doctor"], "callback", raising(RuntimeError("a bug")))
    monkeypatch.setattr(sys, "argv", ["genattn", "doctor"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def called(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "genattn", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )


SMALL = "--frames 5 --height 64 --width 64 --steps 2 --device cpu --prompt cat --attention adaptive --out a.mp4"


def test_generate_writes_nothing_on_standard_error(random_wan_folder: Path, tmp_path: Path) -> None:
    done = called("generate", "--model", str(random_wan_folder), *SMALL.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.mp4").is_file()


def test_long_writes_lines_and_no_bars_into_a_log(random_wan_folder: Path, tmp_path: Path) -> None:
    size = "--frames 5 --height 32 --width 32 --steps 3 --latents-per-level 7 --guidance-scale 1"
    asked = f"{size} --device cpu --prompt cat --folder film"
    done = called("long", "--model", str(random_wan_folder), *asked.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert all(line.startswith(("long video: ", "first frame: ")) for line in done.stderr.splitlines()), done.stderr


def test_doctor_writes_nothing_on_standard_error(tmp_path: Path) -> None:
    done = called("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion(tmp_path: Path) -> None:
    done = called(cwd=tmp_path, _GENATTN_COMPLETE="complete_bash", COMP_WORDS="genattn gener", COMP_CWORD="1")
    assert done.stdout.strip() == "generate"
    # the parent process need not be a shell that could be asked
    done = called("--show-completion", "bash", cwd=tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_GENATTN_COMPLETE=complete_bash" in done.stdout
