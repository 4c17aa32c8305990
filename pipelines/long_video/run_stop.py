"""Ctrl-C as a wish: the tick under way is finished, then the film and its checkpoint are closed. A second Ctrl-C stops at
once."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `asked`; the second acts as it always did. Does nothing off the main
    thread. last_signal: the number of the one that came last, for the exit code of a process."""

    last_signal: ClassVar[int] = signal.SIGINT

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        type(self).last_signal = number
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this tick; once more to stop at once", file=sys.stderr, flush=True)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
