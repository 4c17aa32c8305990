"""Standard streams as shells leave them: closed (`>&-`), on a full disk, or with a reader that has gone (`| head`)."""

import contextlib
import errno
import io
import os
import sys
from typing import Any


class Nowhere(io.TextIOBase):
    """A text stream in the place of one that was closed."""

    def write(self, text: str) -> int:
        """Number of characters, all of them dropped."""
        return len(text)


class Lenient:
    """A text stream that work goes on without: what cannot be written any more is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Number of characters, also where nobody reads them."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As far as it can be."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Any:
        try:
            yield
        except OSError:
            drop(self._stream)


def prepare() -> None:
    """Make both streams usable; standard error carries progress and notes, and no run may end because nobody reads them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Nowhere())
        stream = getattr(sys, name)
        # a code page without box drawing must not cost a run's report
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not isinstance(sys.stderr, Lenient):
        sys.stderr = Lenient(sys.stderr)


def drop(stream: Any) -> None:
    """Send what is still to come, the interpreter's own last flush included, nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def settle() -> None:
    """Flush standard output; what cannot be written is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        drop(sys.stdout)


def reader_has_gone(error: BaseException | None) -> bool:
    """Whether it tells of a closed pipe; click ends with exit code 1 while it handles one."""
    return isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE)
