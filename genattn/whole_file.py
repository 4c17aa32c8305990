"""Files that are whole or not there: written beside their name, and given it when the last byte is out.

    with whole_file("out/map.safetensors") as part:
        save_file(tensors, part)

A write that fails or is stopped leaves what had the name before. The name may be a link: its target is replaced, the link
stays. What a killed process has left beside the name goes when the same file is written again.
"""

import contextlib
import errno
import io
import itertools
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # a folder may be shared by machines, and process numbers are not
_COUNT = itertools.count()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to, in the folder of `path`; the folder is made.

    Raises OSError for what cannot be written. Whatever is raised inside, the half-written file is gone and the old one stays.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{next(_COUNT)}.part")
    try:
        with _named(target):
            yield part
            with contextlib.suppress(OSError):  # a file that others must not read stays so
                shutil.copymode(target, part)
            os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        _sweep(target)


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text in UTF-8; gives the path."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def write_picture(picture: Any, path: str | os.PathLike[str], kind: str = "PNG", **options: Any) -> Path:
    """Write a PIL picture; kind, options: as Pillow's `save` takes them. Gives the path."""
    content = io.BytesIO()  # Pillow's own writing takes a last block that the disk took half of for whole
    picture.save(content, format=kind, **options)
    return _write_bytes(path, content)


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int, **options: Any) -> Path:
    """Write a matplotlib figure in the format of the path's ending. options: as its `savefig` takes them. Gives the path."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower() or "png", dpi=dpi, **options)
    return _write_bytes(path, content)


def _write_bytes(path: str | os.PathLike[str], content: io.BytesIO) -> Path:
    with whole_file(path) as part:
        part.write_bytes(content.getvalue())
    return Path(path)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """An OSError names the file that was wanted; safetensors tells of a full disk by an error of its own."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # PyAV's own takes no other name
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else errno.EIO
        raise OSError(number, os.strerror(number) if told else str(error), str(target)) from error


def _sweep(target: Path) -> None:
    """Remove what processes of this machine that are no more have left beside the name."""
    if os.name != "posix":  # elsewhere nothing tells without harm whether a process lives
        return
    mine = re.compile(rf"\.{re.escape(target.name)}\.{_HOST}-(\d+)-\d+\.part")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            found = mine.fullmatch(name)
            if found and not _lives(int(found[1])):
                (target.parent / name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
