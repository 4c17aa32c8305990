"""Files that carry cover pictures beside the film, tagged or not, are read as players show them: the film."""

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from genattn.apps.sampling import output_files
from genattn.errors import GenAttnError
from genattn.pipelines.finetune.data import ClipSource, read_clip
from genattn.pipelines.long_video.quality import video_metrics
from genattn.pipelines.video.film_stream import film_of

COVER, FILM = (240, 10, 10), (10, 10, 240)


def write(path: Path, counts: dict[str, int], options: dict[str, str] | None = None) -> None:
    """A file with a stream per entry, in this order: the film of 32 x 48, every other of 64 x 64; "sound" is silence."""
    with av.open(str(path), "w", options=options or {}) as container:
        streams = []
        for name, count in counts.items():
            if name == "sound":
                streams.append((container.add_stream("aac", rate=8000, layout="mono"), name, count))
                continue
            stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
            stream.height, stream.width, stream.pix_fmt = (32, 48, "yuv444p") if name == "film" else (64, 64, "yuv444p")
            streams.append((stream, name, count))
        for stream, name, count in streams:
            for n in range(count):
                if name == "sound":
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    frame.sample_rate, frame.pts = 8000, n * 1024
                else:
                    shape = (stream.height, stream.width, 3)
                    picture = np.broadcast_to(np.uint8(FILM if name == "film" else COVER), shape)
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def assert_is_film(path: Path, frames: int) -> None:
    whole, _ = output_files.read_video(path)
    measured, rate = video_metrics.read_video(path)
    clip = read_clip(ClipSource("clip", "x", path), frames, 16, 16)
    assert whole.shape == measured.shape == (frames, 32, 48, 3)
    assert rate == pytest.approx(8, rel=0.2)
    for read in (whole, measured, clip):
        assert np.abs(read.astype(int) - FILM).max() < 12


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("order", [("cover", "film"), ("film", "cover"), ("cover", "sound", "film", "other")])
def test_an_untagged_cover_is_not_the_film(suffix: str, order: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    write(path, {name: {"film": 9, "sound": 5}.get(name, 1) for name in order})
    assert_is_film(path, 9)


def test_fragments_do_not_tell_how_many_frames_there_are(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write(path, {"cover": 1, "film": 9}, {"movflags": "frag_keyframe+empty_moov"})
    with av.open(str(path)) as container:
        assert not all(stream.frames for stream in container.streams.video)
    assert_is_film(path, 9)


def stream(index: int, frames: int, disposition: int = 0) -> SimpleNamespace:
    return SimpleNamespace(index=index, frames=frames, disposition=disposition)


def holding(*streams: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(streams=SimpleNamespace(video=list(streams)))


@pytest.mark.parametrize("tag", [0x400, 0x800, 0x401])
def test_a_tagged_cover_is_none_however_long(tag: int) -> None:
    assert film_of(holding(stream(0, 50, tag), stream(1, 9), stream(2, 4))).index == 1
    assert film_of(holding(stream(0, 0, tag), stream(1, 0))).index == 1
    assert film_of(holding(stream(0, 9, 1), stream(1, 9))).index == 0
    with pytest.raises(GenAttnError, match="must hold a film, got only a cover picture"):
        film_of(holding(stream(0, 1, tag)))


def test_a_file_of_sound_alone_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    write(path, {"sound": 5})
    with pytest.raises(GenAttnError, match=r"sound.mp4 could not be read as a video \(it must hold a film, got no video str"):
        video_metrics.read_video(path)
    with pytest.raises(GenAttnError, match=r"cannot be read as a video \(it must hold a film, got no video stream"):
        read_clip(ClipSource("clip", "x", path), 2, 16, 16)
