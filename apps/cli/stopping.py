"""What is said after Ctrl-C or SIGTERM, and with which exit code; a command whose work can go on says how."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

USUAL = "stopped; no unfinished file was left"


@dataclass
class StopMessage:
    """text: the line on standard error. code: of the process, 128 and the signal's number, as a shell counts."""

    text: str = USUAL
    code: int = 128 + signal.SIGINT


MESSAGE = StopMessage()


def say_when_stopped(text: str) -> None:
    """From now on an interrupt ends this command with `text`."""
    MESSAGE.text = text


@contextmanager
def heeding_terminate() -> Iterator[None]:
    """While entered, SIGTERM ends a command as Ctrl-C does, its files closed, but with its own exit code."""

    def stop(*_: Any) -> None:
        MESSAGE.code = 128 + signal.SIGTERM
        raise KeyboardInterrupt

    MESSAGE.code = 128 + signal.SIGINT
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
