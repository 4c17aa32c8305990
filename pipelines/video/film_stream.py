"""Which video stream of a file is the film: files of shops, phones and editors carry cover pictures as video streams too."""

from collections import Counter
from typing import Any

from genattn.errors import GenAttnError

_COVER = 0x400 | 0x800  # FFmpeg's dispositions attached_pic and timed_thumbnails


def film_of(container: Any) -> Any:
    """The stream of an open av.InputContainer that a player shows: no cover picture, and the longest of several by frames.

    Covers without a tag are told by their one frame. Of equally long streams the first is taken.

    Raises GenAttnError for a file without video, or with nothing but cover pictures.
    """
    if not container.streams.video:
        raise GenAttnError("it must hold a film, got no video stream")
    films = [stream for stream in container.streams.video if not is_cover(stream)]
    if not films:
        raise GenAttnError("it must hold a film, got only a cover picture")
    if len(films) == 1:
        return films[0]
    counts = {stream.index: stream.frames for stream in films}
    if not all(counts.values()):  # Matroska and fragmented files do not tell
        counts = _packets(container, films)
    return max(films, key=lambda stream: counts[stream.index])


def is_cover(stream: Any) -> bool:
    """Whether the file marks a stream as a cover picture or as thumbnails."""
    return bool(int(getattr(stream, "disposition", 0)) & _COVER)  # PyAV before 14 tells none


def _packets(container: Any, streams: list[Any]) -> Counter[int]:
    """How many packets each stream holds; the container stands at its beginning afterwards."""
    found = Counter(packet.stream.index for packet in container.demux(streams) if packet.size)
    container.seek(container.start_time or 0)
    return found
