"""What is said after Ctrl-C or SIGTERM; a command whose work can go on says how."""

from dataclasses import dataclass


@dataclass
class StopMessage:
    """text: the line on standard error beside exit code 130."""

    text: str = "stopped; no unfinished file was left"


MESSAGE = StopMessage()


def say_when_stopped(text: str) -> None:
    """From now on an interrupt ends this command with `text`."""
    MESSAGE.text = text
