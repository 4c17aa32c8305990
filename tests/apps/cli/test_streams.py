"""Commands whose standard output or standard error is closed, full, or read by nobody any more."""

import os
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from genattn.apps.cli import root as cli
from genattn.apps.cli.printing import print_table
from genattn.apps.cli.streams import Lenient

# through click's echo, through rich's console, and through click's own help
SPOKEN = ("--version", "--help", "plan --help", "plan --model wan-14b --json", "simulate --grid 4x8x8 --window 2x4x4")


def run(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["genattn", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A file on a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as stream:
        yield stream


@pytest.mark.parametrize("line", SPOKEN)
def test_a_reader_that_has_gone_is_no_failure(line: str, unread: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    assert run(monkeypatch, line) == 0
    unread.flush()  # as the interpreter does at its end; what is left must not make it end with 120


@pytest.mark.parametrize("line", SPOKEN)
def test_a_full_disk_is_one_line(
    line: str, full: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert run(monkeypatch, line) == 1
    full.flush()
    assert capsys.readouterr().err == "genattn: No space left on device\n"


@pytest.mark.parametrize("line", SPOKEN)
def test_without_standard_output_the_work_is_done(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run(monkeypatch, line) == 0


@pytest.mark.parametrize("how", ["unread", "full", "closed"])
def test_a_refusal_that_nobody_reads_is_a_refusal(
    how: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(sys, "stderr", None if how == "closed" else request.getfixturevalue(how))
    assert run(monkeypatch, "plan --model nonsense") == 2


def test_progress_that_nobody_reads_does_not_end_a_run(unread: TextIO) -> None:
    stream = Lenient(unread)
    assert stream.write("50 %\n" * 10_000) == 50_000
    stream.flush()
    assert stream.fileno() == unread.fileno()


def test_a_table_without_a_terminal_is_160_wide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table([{"what": "word " * 100, "seconds": 0.123456, "share": None}])
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines} == {160}
    assert "0.1235" in lines[3]
