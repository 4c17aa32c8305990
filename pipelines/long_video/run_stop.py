"""Ctrl-C as a wish: the tick under way is finished, then the film and its checkpoint are closed. A second Ctrl-C stops at
once."""

import contextlib
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `asked`; a second stops at once. Does nothing off the main
    thread, nor for a signal that is ignored. last_signal: the number of the one that came last, for the exit code of a
    process."""

    last_signal: ClassVar[int] = signal.SIGINT

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        type(self).last_signal = number
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("\nstopping after this tick; once more to stop at once", file=sys.stderr, flush=True)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
