"""One run at a time writes to a place: advisory locks of the operating system, which end with the process however that ends.

with only_writer("out/tuned", "--out"):
    ...
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from genattn.errors import GenAttnError


@contextlib.contextmanager
def only_writer(place: str | os.PathLike[str], other: str, patience: float = 0.0) -> Iterator[None]:
    """While entered, nobody else enters with the same file or folder `place`, in any process or thread.

    other: what to choose otherwise, for the message, as "--out". The lock is .NAME.lock beside the place, whose folder is made,
    and goes afterwards. Nothing is held where no file can be made there: then the place cannot be written either. patience:
    seconds to wait for others, where what they do is short.

    Raises GenAttnError where somebody has entered, and stays.
    """
    place = Path(place)
    target = place.resolve()
    held: FileLock | None = None
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        held = take_lock(target.with_name(f".{target.name}.lock"), f"{place} is in use: another run", other, patience)
    try:
        yield
    finally:
        if held is not None:
            leave_lock(held)


def take_lock(path: Path, busy: str, other: str, patience: float = 0.0) -> FileLock:
    """The lock file `path`, held by the caller. busy: who has it, other: what to give instead, both for the message.

    patience: seconds to wait.

    Raises GenAttnError where somebody holds it, OSError where no file can be made.
    """
    lock = FileLock(path, thread_local=False)  # what is begun in one thread may be ended in another
    try:
        lock.acquire(timeout=patience)
        while not path.exists():  # it was opened just before its holder removed it: nobody else would meet this lock
            lock.release()
            lock.acquire(timeout=patience)
    except Timeout:
        raise GenAttnError(f"{busy} writes there at this moment; wait for it to end, or give another {other}") from None
    return lock


def leave_lock(lock: FileLock) -> None:
    """Let others have it, the file removed; a second call does nothing."""
    if lock.is_locked:
        with contextlib.suppress(OSError):  # an open file cannot be deleted everywhere
            Path(lock.lock_file).unlink()
        lock.release()
