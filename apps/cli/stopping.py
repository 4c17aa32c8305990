"""What is said after Ctrl-C or SIGTERM; a command whose work can go on says how."""

from dataclasses import dataclass

USUAL = "stopped; no unfinished file was left"


@dataclass
class StopMessage:
    """text: the line on standard error beside exit code 130."""

    text: str = USUAL


MESSAGE = StopMessage()


def say_when_stopped(text: str) -> None:
    """From now on an interrupt ends this command with `text`."""
    MESSAGE.text = text
