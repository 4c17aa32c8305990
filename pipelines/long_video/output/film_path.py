"""Where a film goes: checked before the first model call, remembered in the checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.durable import make_folder

FILM = "video.mp4"


def film_path(output: str | os.PathLike[str] | None, folder: Path | None) -> Path | None:
    """The film's file, its folder made; None for a film that is only iterated.

    Raises GenAttnError for what cannot become an MP4 file: another suffix, a folder of that name, no right to write there.
    """
    if output is None:
        return None if folder is None else folder / FILM
    path = Path(output)
    if path.suffix.lower() != ".mp4":
        raise GenAttnError(f"output must be an MP4 file, got {str(path)!r}; give a name that ends in .mp4")
    if path.is_dir():
        raise GenAttnError(f"output must be a file, and {str(path)!r} is a folder; name a file in it, or pass it as folder=...")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise GenAttnError(f"output must stand in a folder that can be made, got {str(path)!r} ({error})") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GenAttnError(f"output must be a file that may be written, got {str(path)!r}; choose another place")
    return path


def told_place(path: Path, folder: Path) -> str:
    """The film's place as a checkpoint tells it: by name in the run's folder, which may be moved, else the whole path."""
    return path.name if path.parent.resolve() == folder.resolve() else str(path.resolve())


def place_of(film: Mapping[str, Any], folder: Path) -> Path:
    """The film's file from a checkpoint's record of it."""
    return folder / str(film.get("path", FILM))
