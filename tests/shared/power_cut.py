"""A folder as a power cut would leave it: what was not waited for may be gone, names and contents each on their own.

    with watching(folder) as log:  ...work...          every fsync, rename and removal is a point where the power may go
    for state in log.states(): state.write_to(empty)   {name: bytes} as found afterwards

An fsync of a file fixes its contents, one of the folder its names. What has not been fixed may have reached the disk or not.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """The folder after a cut. moment: index of the point of the log where the power went."""

    moment: int
    files: tuple[tuple[str, bytes], ...]

    def write_to(self, folder: Path) -> Path:
        """The same files in a new folder."""
        folder.mkdir(parents=True)
        for name, content in self.files:
            (folder / name).write_bytes(content)
        return folder


@dataclass
class Moment:
    """names, contents: what a reader sees now. kept_names, kept_contents: what is surely on disk. Files are numbered."""

    names: dict[str, int]
    contents: dict[int, bytes]
    kept_names: dict[str, int]
    kept_contents: dict[int, bytes]


@dataclass
class Log:
    """What was done to the files of one folder."""

    folder: Path
    moments: list[Moment] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept_names: dict[str, int] = field(default_factory=dict)
    _kept_contents: dict[int, bytes] = field(default_factory=dict)
    _last: dict[int, bytes] = field(default_factory=dict)
    _count: int = 0

    def _look(self) -> dict[str, int]:
        seen = {path.name: path.stat().st_ino for path in self.folder.iterdir() if path.is_file()}
        # an inode without a name is free to be given to another file
        self._numbers = {inode: number for inode, number in self._numbers.items() if inode in seen.values()}
        for inode in seen.values():
            if inode not in self._numbers:
                self._numbers[inode] = self._count = self._count + 1
        names = {name: self._numbers[inode] for name, inode in seen.items()}
        self._last |= {number: (self.folder / name).read_bytes() for name, number in names.items()}
        return names

    def mark(self) -> None:
        """The power may go here."""
        names = self._look()
        contents = {number: self._last[number] for number in {*names.values(), *self._kept_names.values()}}
        self.moments.append(Moment(names, contents, dict(self._kept_names), dict(self._kept_contents)))

    def synced(self, handle: int) -> None:
        """An fsync returned."""
        told, names = os.fstat(handle), self._look()
        if told.st_ino == self.folder.stat().st_ino:
            self._kept_names = names
        elif told.st_ino in self._numbers:
            number = self._numbers[told.st_ino]
            self._kept_contents[number] = self._last[number]

    def states(self, seed: int = 0) -> Iterator[Found]:
        """Every distinct folder: all that was not waited for is lost; only names, or only contents, arrived; all arrived; and
        a few draws where each had its own luck."""
        seen = set()
        draw = random.Random(seed)
        for index, moment in enumerate(self.moments):
            for luck in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5), (0.5, 0.5)):
                found = _cut(moment, draw, *luck)
                if (index, found) not in seen:
                    seen.add((index, found))
                    yield Found(index, found)


def _cut(moment: Moment, draw: random.Random, names_arrive: float, contents_arrive: float) -> tuple[tuple[str, bytes], ...]:
    files = {}
    for name in sorted({*moment.names, *moment.kept_names}):
        arrived = draw.random() < names_arrive
        number = (moment.names if arrived else moment.kept_names).get(name)
        if number is None:
            continue
        kept = moment.kept_contents.get(number, b"")
        now = moment.contents.get(number, kept)
        files[name] = now if draw.random() < contents_arrive else kept
    return tuple(files.items())


@contextmanager
def watching(folder: Path, monkeypatch) -> Iterator[Log]:
    """Note every point at which files of `folder` are waited for, renamed or removed."""
    log = Log(folder)
    folder.mkdir(parents=True, exist_ok=True)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def fsync(handle):
        log.mark()
        real["fsync"](handle)
        log.synced(handle)
        log.mark()

    def noted(name):
        def call(*args, **kwargs):
            log.mark()
            out = real[name](*args, **kwargs)
            log.mark()
            return out

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in ("replace", "unlink"):
            patch.setattr(os, name, noted(name))
        yield log
