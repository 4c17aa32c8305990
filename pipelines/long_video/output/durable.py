"""Files that outlast a power cut: the order in which a run's files reach the disk.

    film fragment -> fsync        the film is complete up to the place that the record will name
    tensors       -> fsync, rename, fsync of the folder
    record        -> fsync, rename, fsync of the folder
    old tensors   -> removed

Without an fsync a file system may keep a rename and lose what was written before it; without one of the folder it may forget
the rename. Nothing that a record on disk names is ever touched before a newer record is on disk too.
"""

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until a file's contents are on disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk; does nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_synced(scratch: Path, path: Path) -> None:
    """Give a file that was just written its name, both on disk when this returns; what had the name before is gone."""
    sync_file(scratch)
    os.replace(scratch, path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """A folder and its parents, their names on disk when this returns."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)
