"""One run per folder: an advisory lock of the operating system, which ends with the process however that ends."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.durable import make_folder

_NAME = "run.lock"


class FolderLock:
    """Held from its making until `release`; a second one on the same folder, in any process, raises GenAttnError.

    The file DIR/run.lock stays behind, empty; it means nothing by itself.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        make_folder(folder)
        # a film may be begun in one thread and taken in another
        self._lock = FileLock(folder / _NAME, thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise GenAttnError(
                f"{folder} is in use: another run writes there at this moment; wait for it to end, or give another folder"
            ) from None

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        self._lock.release()
