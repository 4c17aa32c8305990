"""Files a command leaves behind: checked before work starts, written beside their name and moved when whole.

A run that is stopped leaves no file that looks finished. Prompt, seed and settings travel in the file's metadata.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genattn.errors import GenAttnError
from genattn.pipelines.video.film_stream import film_of
from genattn.pipelines.video.upright import upright
from genattn.whole_file import write_picture, write_whole

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_MARGIN = 32  # bytes that names beside a file may add: .side-by-side, .preview, a process number
_IMAGE_DESCRIPTION = 0x010E  # EXIF's tag
Frames = npt.NDArray[np.uint8]


def check_out(path: Path, suffixes: Sequence[str], option: str = "--out") -> None:
    """Make the folder of `path` and prove that it can be written.

    Raises:
        GenAttnError, naming `option`: another suffix than `suffixes`, a folder of that name, or no right to write there.
    """
    if path.suffix.lower() not in suffixes:
        raise GenAttnError(f"{option} must end in {', '.join(suffixes)}, got {str(path)!r}")
    if _is_folder(path):
        raise GenAttnError(f"{option} must name a file, but {str(path)!r} is a folder; add a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(os.path.realpath(path)).parent  # of a link's target, where the file will be
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        longest = os.pathconf(path.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    except OSError as error:
        raise GenAttnError(f"{option} {str(path)!r} cannot be written: {error.strerror or error}") from None
    if len(path.name.encode()) > longest - _MARGIN:
        raise GenAttnError(
            f"{option} must have a file name of at most {longest - _MARGIN} bytes, got {len(path.name.encode())}; "
            "what stands beside it (a report, a half-written file) needs the rest"
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no folder could have
        return False


def check_folder(folder: Path, option: str) -> None:
    """Make `folder` and prove that files can be written into it.

    Raises GenAttnError, naming `option`: a file of that name, or no right to write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GenAttnError(f"{option} must be a folder to write into, got {str(folder)!r}: {error.strerror or error}") from None


def write_video(path: Path, frames: Frames, fps: float, metadata: Mapping[str, Any]) -> None:
    """H.264 video of uint8 frames [T, H, W, 3] at `fps` frames a second, `metadata` as JSON in its comment."""
    from genattn.pipelines.long_video.output.save_video import save_video

    save_video(frames, path, fps, metadata)


def read_video(path: Path) -> tuple[Frames, dict[str, Any]]:
    """Frames uint8 [T, H, W, 3] and the metadata that `write_video` put in."""
    import av

    with av.open(str(path)) as container:
        frames: Frames = np.stack([upright(frame) for frame in container.decode(film_of(container))])
    return frames, read_metadata(path)


def write_image(path: Path, image: Frames, metadata: Mapping[str, Any]) -> None:
    """A picture uint8 [H, W, 3] with `metadata` as JSON: in PNG a text chunk, in JPEG and WebP the EXIF description."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    tags: dict[str, Any] = {}
    if kind == "PNG":
        tags["pnginfo"] = PngInfo()
        tags["pnginfo"].add_text("parameters", json.dumps(metadata))
    else:
        tags["exif"] = Image.Exif()
        tags["exif"][_IMAGE_DESCRIPTION] = json.dumps(metadata)
    write_picture(Image.fromarray(image), path, kind, **tags)


def read_metadata(path: Path) -> dict[str, Any]:
    """Prompt, seed and settings that a file of ours carries; nothing for other files.

    Raises GenAttnError when the file cannot be opened.
    """
    try:
        text = _picture_text(path) if path.suffix.lower() in IMAGE_SUFFIXES else _film_text(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise GenAttnError(f"{str(path)!r} cannot be read ({error}); give a video or a picture") from None
    try:
        found = json.loads(text)
    except ValueError:  # somebody else's comment
        return {}
    return found if isinstance(found, dict) else {}


def _picture_text(path: Path) -> str:
    from PIL import Image

    try:
        picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(error) from None
    with picture:
        return str(picture.info.get("parameters") or picture.getexif().get(_IMAGE_DESCRIPTION, ""))


def _film_text(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}  # Matroska writes them in capitals
    return tags.get("comment", "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, moved into place when whole."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
