"""One run per folder and per film: advisory locks of the operating system, which end with the process however that ends."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock

from genattn.one_writer import leave_lock, take_lock
from genattn.pipelines.long_video.output.durable import make_folder

_NAME = "run.lock"


class FolderLock:
    """Held from its making until `release`; a second one on the same folder, in any process, raises GenAttnError.

    The file DIR/run.lock stays behind, empty; it means nothing by itself.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        path = folder / _NAME
        self._is_new = not path.exists()
        self._new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
        make_folder(folder)
        self._lock = take_lock(path, f"{folder} is in use: another run", "folder")

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        self._lock.release()

    def withdraw(self) -> None:
        """Release for a run that never began: what was made for it goes, but for folders that hold something."""
        if self._is_new:
            leave_lock(self._lock)
        self._lock.release()
        with contextlib.suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()


class FilmLock:
    """The same for a film's file, whose folder exists: .NAME.lock beside it, which goes with its release.

    Nothing is held where no file can be made beside the film.
    """

    def __init__(self, film: str | os.PathLike[str]) -> None:
        film = Path(film)
        path = film.resolve().with_name(f".{film.resolve().name}.lock")
        self._lock: FileLock | None = None
        with contextlib.suppress(OSError):
            self._lock = take_lock(path, f"{film} is being written: another film", "output")

    def release(self) -> None:
        """Let others have the file; a second call does nothing."""
        if self._lock is not None:
            leave_lock(self._lock)

    def withdraw(self) -> None:
        """Release for a film that never began."""
        self.release()


class RunLocks:
    """What a run holds, let go together."""

    def __init__(self) -> None:
        self._held: list[FolderLock | FilmLock] = []

    def add(self, lock: FolderLock | FilmLock) -> None:
        """One more."""
        self._held.append(lock)

    def release(self) -> None:
        """Let others have all of it; a second call does nothing."""
        for lock in self._held:
            lock.release()

    def withdraw(self) -> None:
        """The same for a run that never began, of which nothing stays."""
        for lock in reversed(self._held):
            lock.withdraw()
