"""What is said after Ctrl-C or SIGTERM, and with which exit code; a command whose work can go on says how."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USUAL = "stopped; no unfinished file was left"
_MOMENT = 0.05  # seconds
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # beside Ctrl-C
CODES = (128 + signal.SIGINT, *(128 + number for number in STOPS))


@dataclass
class StopMessage:
    """text: the line on standard error, or what gives it then. code: of the process, 128 and the signal's number, as a shell
    counts."""

    text: str | Callable[[], str] = USUAL
    code: int = 128 + signal.SIGINT

    @property
    def line(self) -> str:
        """The text as it is now."""
        return self.text if isinstance(self.text, str) else self.text()


MESSAGE = StopMessage()


def say_when_stopped(text: str | Callable[[], str]) -> None:
    """From now on an interrupt ends this command with `text`, or with what it gives when that comes."""
    MESSAGE.text = text


def same_command_goes_on(kept: Path) -> None:
    """From now on an interrupt tells of what is in the file `kept`, once it is there."""
    say_when_stopped(lambda: f"stopped; the same command goes on from {kept}" if kept.is_file() else USUAL)


def rows_stay(table: Path) -> None:
    """From now on an interrupt tells of the rows that were added to `table` until then."""
    before = _content(table)

    def told() -> str:
        if _content(table) == before:
            return USUAL
        return f"stopped; the cases measured so far are in {table}, and the same command measures all of them again"

    say_when_stopped(told)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@contextmanager
def heeding_terminate() -> Iterator[None]:
    """While entered, SIGTERM ends a command as Ctrl-C does, its files closed, but with its own exit code.

    So does SIGHUP, which comes when a terminal is closed, unless `nohup` has it ignored; and SIGINT where a shell script
    started the command in the background, for which shells have it ignored. A stop that comes while a destructor or a callback
    of C runs, where Python drops what is raised, comes again a moment later.
    """

    def stop(number: int, frame: Any) -> None:
        MESSAGE.code = 128 + number
        raise KeyboardInterrupt

    MESSAGE.code = 128 + signal.SIGINT
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _told_again():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(number: int) -> None:
    """A signal to the main thread that also ends a sleep or a read there; `interrupt_main` waits until that returns."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        _thread.interrupt_main(signal.Signals(number))


@contextmanager
def _told_again() -> Iterator[None]:
    """While entered, a KeyboardInterrupt that Python drops comes once more, a moment later."""
    hook = sys.unraisablehook
    waiting: list[threading.Timer] = []

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            hook(dropped)
            return
        # not from here: it would be raised, and dropped, within this very function
        waiting.append(threading.Timer(_MOMENT, _send, [MESSAGE.code - 128]))
        waiting[-1].daemon = True
        waiting[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in waiting:
            timer.cancel()
