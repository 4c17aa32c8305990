"""Clips and captions for fine-tuning, from a folder or a webdataset tar; what cannot be used is listed, never dropped silently.

folder   a.mp4 + a.txt, b.mp4 + b.txt ...          or clips beside one metadata.jsonl / metadata.csv (file_name, text)
tar      key.mp4 + key.txt, or key.mp4 + key.json with "caption" or "text"      (as webdataset; a key may have dots)
"""

import csv
import hashlib
import io
import json
import lzma
import tarfile
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from genattn.errors import GenAttnError, first_line
from genattn.pipelines.video.film_stream import film_of
from genattn.pipelines.video.upright import is_turned, pixel_of, shown_size, upright
from genattn.text_file import decoded

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
CAPTION_NAMES = ("text", "caption", "prompt")
FILE_NAMES = ("file_name", "file", "video")
# tarfile hands on what its decompressors raise
_BROKEN_TAR = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ClipSource:
    """One clip that has a caption. name: relative path or tar member. container: the tar, None for a plain file."""

    name: str
    caption: str
    path: Path
    member: str | None = None

    def read_bytes(self) -> bytes:
        """The encoded clip."""
        if self.member is None:
            return self.path.read_bytes()
        with tarfile.open(self.path) as archive:
            file = archive.extractfile(self.member)
            if file is None:
                raise OSError(f"{self.member} is no file")
            return file.read()


@dataclass
class Dataset:
    """Clips to train on. skipped: (name, reason) of everything that was found and cannot be used."""

    clips: list[ClipSource] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        """Note a clip that cannot be used."""
        self.skipped.append((name, reason))

    def fingerprint(self) -> str:
        """A short hash over the names and captions of all clips; tells one dataset from another."""
        told = json.dumps(sorted((clip.name, clip.caption) for clip in self.clips))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """One line per skipped clip under a head line."""
        head = f"{len(self.clips)} clips, {len(self.skipped)} skipped"
        return "\n".join([head, *(f"  skipped {name}: {reason}" for name, reason in self.skipped)])


def find_clips(source: Path) -> Dataset:
    """The clips of a folder, a tar, or a folder of tars, in the order of their names.

    Raises GenAttnError when there is nothing to train on: no such path, no clip, or no clip with a caption.
    """
    if not source.exists():
        raise GenAttnError(f"--data must name a folder or a .tar of clips, but there is no {str(source)!r}")
    dataset = Dataset()
    tars = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if source.is_file() and source.suffix != ".tar":
        raise GenAttnError(f"--data must name a folder or a .tar of clips, got the file {str(source)!r}")
    for tar in tars:
        _from_tar(tar, dataset)
    if not source.is_file():
        _from_folder(source, dataset)
    if not dataset.clips and not dataset.skipped:
        raise GenAttnError(f"--data must hold clips ({', '.join(VIDEO_SUFFIXES)}) with captions, found none in {source}")
    check_any(dataset)
    return dataset


def check_any(dataset: Dataset) -> None:
    """Raise GenAttnError, with the first reasons, when no clip is left."""
    if not dataset.clips:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dataset.skipped[:5])
        raise GenAttnError(f"no clip of the dataset can be used, {len(dataset.skipped)} were skipped: {reasons}")


def _from_folder(folder: Path, dataset: Dataset) -> None:
    captions = _metadata(folder)
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    for path in videos:
        name = path.relative_to(folder).as_posix()
        if not path.is_file():  # a folder of that name, a pipe that nobody writes to, a link to nothing
            dataset.skip(name, "it is no file")
            continue
        text = captions.pop(_plain_name(name), None)
        beside = next((p for p in (path.with_suffix(".txt"), path.with_suffix(".TXT")) if p.is_file()), None)
        if text is None and beside is not None:
            text = _caption_of(beside.read_bytes(), dataset, name)
            if text is None:
                continue
        _add(dataset, name, text, path)
    for name in captions:
        dataset.skip(name, "named in the metadata, but there is no such clip")


def _metadata(folder: Path) -> dict[str, str]:
    """{clip: caption} of metadata.jsonl or metadata.csv, empty without one."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if lines.is_file():
        # only a line feed ends a line of JSON: strings may hold U+2028 and its kin
        texts = [line for line in _metadata_text(lines).split("\n") if line.strip()]
        return _captions([_json_object(text, f"{lines}, line {i}") for i, text in enumerate(texts, 1)], lines)
    if table.is_file():
        try:
            rows = list(csv.DictReader(io.StringIO(_metadata_text(table), newline=""), skipinitialspace=True))
        except csv.Error as error:
            raise GenAttnError(f"{table} must be a table of comma-separated values, and is none ({error})") from None
        return _captions(rows, table)
    return {}


def _metadata_text(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise GenAttnError(f"{path} must be UTF-8 text, got another encoding ({error.reason}); save it as UTF-8") from None


def _captions(rows: Sequence[Mapping[Any, object]], source: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows:
        name = next((row[n] for n in FILE_NAMES if row.get(n)), None)
        if None in row:
            raise GenAttnError(
                f"a row of {source} has more cells than columns; put captions with commas in quotes: {dict(row)}"
            )
        if name is None:
            raise GenAttnError(f"each row of {source} must name its clip as one of {', '.join(FILE_NAMES)}, got {dict(row)}")
        plain, text = _plain_name(str(name)), _text_of(row, str(source))
        if found.setdefault(plain, text) != text:
            raise GenAttnError(
                f"{source} must have one caption a clip, got {found[plain]!r} and {text!r} for {plain}; drop one"
            )
    return found


def _text_of(row: Mapping[str, object], place: str) -> str:
    """The caption of a row, empty without one."""
    text = next((row[n] for n in CAPTION_NAMES if row.get(n)), "")
    if not isinstance(text, str):
        raise GenAttnError(f"a caption in {place} must be one text, got {text!r}")
    return text


def _plain_name(name: str) -> str:
    """A path with slashes and composed letters, whichever system wrote it."""
    return unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def _json_object(text: str, place: str) -> Mapping[str, object]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenAttnError(f"{place} must be a JSON object, got {text[:60]!r} ({error})") from None
    if not isinstance(row, dict):
        raise GenAttnError(f"{place} must be a JSON object, got {text[:60]!r}")
    return row


def _from_tar(tar: Path, dataset: Dataset) -> None:
    """Members whose names differ in the ending alone are one sample."""
    samples: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(tar) as archive:
            texts = {}
            for member in archive.getmembers():
                if not member.isfile():
                    continue
                key, _, suffix = member.name.rpartition(".")
                samples.setdefault(key, {})[f".{suffix.lower()}"] = member.name
                if suffix.lower() in ("txt", "json"):
                    file = archive.extractfile(member)
                    texts[member.name] = file.read() if file is not None else b""
    except _BROKEN_TAR as error:
        raise GenAttnError(f"{tar} cannot be read as a tar ({first_line(error)}); make it again") from None
    for parts in samples.values():
        video = next((parts[s] for s in VIDEO_SUFFIXES if s in parts), None)
        if video is not None:
            _add_from_tar(dataset, f"{tar.name}/{video}", parts, texts, tar, video)


def _add_from_tar(
    dataset: Dataset, name: str, parts: Mapping[str, str], texts: Mapping[str, bytes], tar: Path, video: str
) -> None:
    told = next((parts[suffix] for suffix in (".txt", ".json") if suffix in parts), None)
    text = None if told is None else _caption_of(texts[told], dataset, name)
    if told is not None and text is None:
        return
    if text is not None and told is not None and ".txt" not in parts:
        text = _text_of(_json_object(text, told), told)
    _add(dataset, name, text, tar, video)


def _caption_of(content: bytes, dataset: Dataset, name: str) -> str | None:
    """The text; None, and the clip skipped, where it is in another encoding."""
    try:
        return decoded(content).strip()
    except UnicodeDecodeError:
        dataset.skip(name, "its caption is not UTF-8 text; save it as UTF-8")
        return None


def _add(dataset: Dataset, name: str, text: str | None, path: Path, member: str | None = None) -> None:
    if text is None:
        dataset.skip(name, "no caption (a .txt of the same name, or a row of the metadata)")
    elif not text.strip():
        dataset.skip(name, "its caption is empty")
    else:
        dataset.clips.append(ClipSource(name, text.strip(), path, member))


def read_clip(source: ClipSource, frames: int, height: int, width: int) -> Frames:
    """The first `frames` frames, cut to the asked shape around the middle and scaled: uint8 [frames, height, width, 3].

    Raises GenAttnError with the reason when the clip cannot serve.
    """
    import av

    try:
        with av.open(io.BytesIO(source.read_bytes()), "r") as container:
            film = film_of(container)
            pixel = pixel_of(film)
            found = [_fitted(frame, height, width, pixel) for frame in islice(container.decode(film), frames)]
    except (av.FFmpegError, OSError, GenAttnError, *_BROKEN_TAR) as error:
        raise GenAttnError(f"it cannot be read as a video ({first_line(error)})") from None
    if len(found) < frames:
        raise GenAttnError(f"it has {len(found)} frames and {frames} are needed")
    return np.stack(found)


def _fitted(frame: "av.VideoFrame", height: int, width: int, pixel: Fraction | None) -> Frames:  # type: ignore[name-defined] # noqa: F821
    """As a player shows it, scaled until it covers the asked shape, then cut around the middle."""
    high, across = shown_size(frame, pixel)
    high, across = (across, high) if is_turned(frame) else (high, across)
    scale = max(height / high, width / across)
    tall, wide = max(height, round(high * scale)), max(width, round(across * scale))
    picture = upright(frame, tall, wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width])
