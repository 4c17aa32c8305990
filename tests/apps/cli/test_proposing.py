"""What is proposed for an option that a command does not have: one that means the same, or is nearly so spelled."""

import sys

import pytest

from genattn.apps.cli.proposing import meant
from genattn.apps.cli.root import main

LONG = ("--prompt", "--prompt-fade", "--folder", "--frames", "--fps", "--resume", "--guidance-scale", "--steps", "--help", "-o")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--out", ["--folder"]),
        ("--output-dir", ["--folder"]),
        ("--guidance", ["--guidance-scale"]),
        ("--scale", ["--guidance-scale"]),
        ("--num-frames", ["--frames"]),
        ("--promt", ["--prompt"]),
        ("--prompts", ["--prompt"]),
        ("--resum", ["--resume"]),
        ("--step", ["--steps"]),
        ("--seed", []),
        ("--helo", []),
        ("-x", []),
    ],
)
def test_the_option_that_was_meant(given: str, found: list[str]) -> None:
    assert meant(given, LONG) == found


def test_at_most_three_the_likeliest_first() -> None:
    assert meant("--out", ["--log", "--save", "--folder", "--to", "--output"]) == ["--output", "--folder", "--log"]
    assert meant("--re", ["--resume"]) == [], "two letters begin anything"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("long --prompt x --out a.mp4", "no such option: --out; did you mean --folder?; see: genattn long --help"),
        ("explain --out a", "no such option: --out; see: genattn explain --help"),
        ("generate --resume a", "no such option: --resume; see: genattn generate --help"),
        ("bench attention --folder a", "no such option: --folder; did you mean --out?; see: genattn bench attention --help"),
        ("generate --no-compare-dens", "did you mean --no-compare-dense or --compare-dense?"),
    ],
)
def test_commands_propose_it(line: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["genattn", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
