"""A video file that grows while the film is being made: fragmented MP4, one closed group of pictures per fragment.

    ftyp moov | moof mdat | moof mdat | ...       (ISO/IEC 14496-12, movie fragments)

Each fragment is encoded on its own and appended in one write, so the file on disk always plays up to its last whole
fragment, a killed process loses at most the frames since then, and a resumed run cuts the file at a known fragment and goes
on. Nothing is kept in memory but the fragment under way.
"""

import io
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.durable import make_folder, sync_folder
from genattn.pipelines.video import colours

_TICKS = 512  # track ticks per 1 / fps numerator, as ffmpeg itself counts


@dataclass(frozen=True)
class WriterMark:
    """A place where the file may be cut: frames and bytes up to and with the last whole fragment."""

    frames: int = 0
    bytes: int = 0


class FragmentedMp4Writer:
    """Append uint8 frames [H, W, 3] to an MP4 at `path`.

    fps: > 0. codec: an encoder PyAV knows. crf: quality, lower is better. fragment_frames: frames per fragment, >= 1; what a
    kill costs.
    mark: continue a file from here; what stands after it is cut off. sync: wait for the disk after every fragment.
    metadata: stands as JSON in the comment of a new file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = 16,
        *,
        codec: str = "libx264",
        crf: int = 18,
        fragment_frames: int = 16,
        mark: WriterMark | None = None,
        sync: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.rate = Fraction(fps).limit_denominator(1001)
        if self.rate <= 0:
            raise GenAttnError(f"fps must be > 0, got {fps}")
        if fragment_frames < 1:
            raise GenAttnError(f"fragment_frames must be >= 1, got {fragment_frames}")
        if codec not in av.codecs_available:
            raise GenAttnError(f"codec {codec!r} is not in this PyAV build; try 'libx264', 'mpeg4' or 'libvpx-vp9'")
        self.codec, self.crf, self.fragment_frames, self.sync = codec, crf, fragment_frames, sync
        self._comment = json.dumps(metadata) if metadata else ""
        self._fragment: _Fragment | None = None
        self._size: tuple[int, int] | None = None
        self.mark = mark or WriterMark()
        self._file = self._open()

    def _open(self) -> Any:
        if self.mark.bytes == 0:
            make_folder(self.path.parent)
            file = open(self.path, "wb", buffering=0)  # noqa: SIM115
            if self.sync:
                sync_folder(self.path.parent)
            return file
        have = self.path.stat().st_size if self.path.exists() else 0
        if have < self.mark.bytes:
            raise GenAttnError(
                f"{self.path} must hold at least {self.mark.bytes} bytes to go on, it has {have}; it was changed or moved"
            )
        file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        file.truncate(self.mark.bytes)
        file.seek(self.mark.bytes)
        return file

    @property
    def frames(self) -> int:
        """Frames taken so far, those of the fragment under way included."""
        return self.mark.frames + (self._fragment.count if self._fragment else 0)

    def write(self, frame: np.ndarray) -> None:
        """Take one frame, uint8 [H, W, 3]; all frames of a file have one size."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise GenAttnError(f"frames must be uint8 [H, W, 3], got {frame.dtype} {tuple(frame.shape)}")
        size = (frame.shape[1], frame.shape[0])
        if self._size not in (None, size):
            raise GenAttnError(f"all frames of a file have one size, {self._size} so far, got {size}")
        self._size = size
        if self._fragment is None:
            self._fragment = _Fragment(size, self.rate, self.codec, self.crf, self.fragment_frames, self._comment)
        self._fragment.add(frame)
        if self._fragment.count >= self.fragment_frames:
            self.flush()

    def flush(self) -> WriterMark:
        """Put what is there on disk as a fragment, however short; the place where the file may now be cut.

        A failed write (disk full) leaves the file at its last whole fragment and is raised.
        """
        if self._fragment is not None:
            fragment, self._fragment = self._fragment, None
            start = self.mark.frames * self.rate.denominator * _TICKS
            data = fragment.finish(start, self.mark.frames, with_header=self.mark.bytes == 0)
            self._append(data)
            self.mark = WriterMark(self.mark.frames + fragment.count, self.mark.bytes + len(data))
        if self.sync:
            os.fsync(self._file.fileno())
        return self.mark

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self.mark.bytes)
            self._file.seek(self.mark.bytes)
            raise

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def abandon(self) -> None:
        """Close without the fragment under way."""
        self._fragment = None
        self._file.close()

    def __enter__(self) -> "FragmentedMp4Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Fragment:
    """One closed group of pictures, encoded as its own small MP4 in memory."""

    def __init__(self, size: tuple[int, int], rate: Fraction, codec: str, crf: int, frames: int, comment: str) -> None:
        self.buffer = io.BytesIO()
        options = {
            "movflags": "empty_moov+default_base_moof+frag_keyframe",
            "video_track_timescale": str(rate.numerator * _TICKS),
        }
        self.container = av.open(self.buffer, "w", format="mp4", options=options)
        if comment:
            self.container.metadata["comment"] = comment
        settings = {"crf": str(crf)} if codec in ("libx264", "libx265", "libvpx-vp9") else {}
        stream: Any = self.container.add_stream(codec, rate=rate, options=settings)
        stream.width, stream.height = size
        # 4:2:0 halves both axes; odd sizes keep full colour resolution instead of losing a row
        stream.pix_fmt = "yuv420p" if size[0] % 2 == 0 and size[1] % 2 == 0 else "yuv444p"
        stream.codec_context.gop_size = frames + 1
        stream.codec_context.max_b_frames = 0
        colours.tag(stream, size[1], size[0])
        self.stream, self.count = stream, 0

    def add(self, frame: np.ndarray) -> None:
        image = colours.coded(frame, self.stream.pix_fmt)
        image.pts, self.count = self.count, self.count + 1
        image.time_base = 1 / self.stream.codec_context.framerate
        self.container.mux(self.stream.encode(image))

    def finish(self, start: int, sequence: int, with_header: bool) -> bytes:
        """The fragment's boxes, moved to `start` on the file's clock."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
        wanted = (b"ftyp", b"moov", b"moof", b"mdat") if with_header else (b"moof", b"mdat")
        out = bytearray()
        data = self.buffer.getvalue()
        for kind, begin, end in _boxes(data, 0, len(data)):
            if kind in wanted:
                box = bytearray(data[begin:end])
                if kind == b"moof":
                    _move(box, start, sequence)
                out += box
        return bytes(out)


def _boxes(data: bytes | bytearray, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        if size == 1:
            size = struct.unpack_from(">Q", data, begin + 8)[0]
        yield kind, begin, begin + size
        begin += size


def _move(moof: bytearray, start: int, sequence: int) -> None:
    # mfhd: version, flags, sequence number; tfdt: version, flags, decode time (32 or 64 bit)
    for kind, begin, end in list(_boxes(moof, 8, len(moof))):
        if kind == b"mfhd":
            struct.pack_into(">I", moof, begin + 12, (sequence + 1) & 0xFFFFFFFF)
        if kind != b"traf":
            continue
        for inner, at, _ in list(_boxes(moof, begin + 8, end)):
            if inner == b"tfdt":
                form = ">Q" if moof[at + 8] == 1 else ">I"
                struct.pack_into(form, moof, at + 12, struct.unpack_from(form, moof, at + 12)[0] + start)
