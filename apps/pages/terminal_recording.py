"""A recording of the command line at work: the real commands in a pseudo-terminal, every byte with its time.

    python -m genattn.apps.pages.terminal_recording          assets/figures/commands.cast (asciinema v2) and commands.svg

The .cast plays in any asciinema player; the .svg is its last screenful, for pages that play nothing.
"""

import codecs
import json
import os
import re
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError

OUT = Path(__file__).resolve().parents[2] / "assets" / "figures" / "commands"
WIDTH, HEIGHT = 118, 32
COMMANDS = (
    'genattn generate --prompt "a red circle moves right on a dark background" --compare-dense --out out.mp4',
    "genattn measure out.mp4",
    "genattn show --grid 6x8x8 --attention radial --block 16",
    "genattn plan --model wan-14b --size 720x1280 --frames 81 --target-density 0.3",
    "genattn generate --prompt a --frames 10",
)
Event = tuple[float, str]


def record(commands: Sequence[str], folder: Path) -> list[Event]:
    """Run each command in `folder`, in a terminal of WIDTH x HEIGHT; (seconds since the start, text shown).

    Raises GenAttnError on systems without pseudo-terminals.
    """
    if os.name != "posix":
        raise GenAttnError(f"a recording needs a pseudo-terminal, got {os.name!r}; run it on Linux or macOS")
    events: list[Event] = []
    begin = time.monotonic()
    for command in commands:
        events.append((time.monotonic() - begin, f"\x1b[1;32m$\x1b[0m {command}\r\n"))
        events += [(at - begin, text) for at, text in _output(command, folder)]
        events.append((time.monotonic() - begin, "\r\n"))
    return events


def _output(command: str, folder: Path) -> list[Event]:
    """What one command shows, as it comes."""
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    words = [sys.executable, "-W", "ignore", "-m", *_words(command)]
    plain = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "HF_HUB_OFFLINE": "1"}
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(words, stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=plain | quiet)
    os.close(follower)
    shown: list[Event] = []
    decoded = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may come in two reads
    while True:
        ready, _, _ = select.select([leader], [], [], 0.1)
        try:
            data = os.read(leader, 65536) if ready else b""
        except OSError:  # the other end is closed
            break
        if data:
            shown.append((time.monotonic(), without_notices(decoded.decode(data))))
        elif process.poll() is not None:
            break
    os.close(leader)
    process.wait()
    return shown


def without_notices(text: str) -> str:
    """Without the lines that optional packages of this machine (torchao, bitsandbytes) log while they are imported."""
    return re.sub(r"[^\r\n]*(?:Failed to load|Unable to import|\bW\d{4} )[^\r\n]*\r?\n", "", text)


def _words(command: str) -> list[str]:
    import shlex

    return shlex.split(command)


def write_cast(events: Sequence[Event], path: Path) -> None:
    """Asciinema's file format, version 2: a header, then a line per event."""
    header = {"version": 2, "width": WIDTH, "height": HEIGHT, "title": "genattn", "idle_time_limit": 1.5}
    lines = [header, *([round(at, 3), "o", text] for at, text in events)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def screen_lines(text: str) -> list[str]:
    """The lines that stand at the end: what a carriage return wrote over is gone, colours stay."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        last = [part for part in line.split("\r") if _visible(part)]
        lines.append(last[-1] if last else "")
    kept = [line for line in lines if not re.search(r"Loading pipeline components|warm-up", line)]
    return [line for i, line in enumerate(kept) if _visible(line) or (i and _visible(kept[i - 1]))]


def _visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip()


def write_svg(events: Sequence[Event], path: Path, title: str = "genattn") -> None:
    """The whole session as a still picture, by rich; no fonts are fetched from anywhere."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    with open(os.devnull, "w") as nowhere:
        console: Any = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        for line in screen_lines("".join(text for _, text in events)):
            shown = re.sub(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]", "", line)  # colours (m) alone
            console.print(Text.from_ansi(shown), overflow="fold")
        form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        path.write_text(console.export_svg(title=title, code_format=form))


def main(out: Path = OUT, commands: Sequence[str] = COMMANDS) -> None:
    """Record `commands` in an empty folder and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        events = record(commands, Path(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_cast(events, out.with_suffix(".cast"))
    write_svg(events, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
