"""The recording runs real commands, and what is shipped was made by today's script."""

import json
import re
import sys
from pathlib import Path

import pytest

from genattn.apps.pages.terminal_recording import COMMANDS, OUT, main, record, screen_lines, without_notices, write_svg
from genattn.errors import GenAttnError


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_records_a_command(tmp_path: Path) -> None:
    main(tmp_path / "a", ["genattn show --grid 2x4x4 --block 8"])
    header, *events = [json.loads(line) for line in (tmp_path / "a.cast").read_text().splitlines()]
    assert (header["version"], header["width"]) == (2, 118)
    assert [event[0] for event in events] == sorted(event[0] for event in events)
    shown = "".join(event[2] for event in events)
    assert "genattn show" in shown
    assert "density" in shown
    picture = (tmp_path / "a.svg").read_text()
    assert "density" in picture
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")


def test_what_was_written_over_is_gone() -> None:
    assert screen_lines("a\r\n 10%|#  \r 90%|###\r\nend\r\n\r\n\r\n") == ["a", " 90%|###", "end", ""]
    assert without_notices("one\r\nFailed to load x\r\ntwo\r\n") == "one\r\ntwo\r\n"


def test_a_long_line_goes_on_below(tmp_path: Path) -> None:
    write_svg([(0.0, "word " * 40 + "last\r\n")], tmp_path / "a.svg")
    rows = re.findall(r'y="([\d.]+)"[^>]*>([^<]*)</text>', (tmp_path / "a.svg").read_text())
    assert len({y for y, shown in rows if "word" in shown}) > 1


def test_needs_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("genattn.apps.pages.terminal_recording.os.name", "nt")
    with pytest.raises(GenAttnError, match="needs a pseudo-terminal, got 'nt'"):
        record(["genattn doctor"], tmp_path)


def test_shipped_recording_shows_todays_commands() -> None:
    cast, picture = OUT.with_suffix(".cast"), OUT.with_suffix(".svg")
    shown = "".join(json.loads(line)[2] for line in cast.read_text().splitlines()[1:])
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line)[2:] for line in shown.split("\r\n") if "\x1b[1;32m$" in line] == list(COMMANDS)
    assert cast.stat().st_size < 150_000
    assert picture.stat().st_size < 150_000
    assert "Traceback" not in shown
    assert "\ufffd" not in shown, "a character that came in two reads"
    assert not re.search(r"/(?:root|home|work|tmp)/", shown)
