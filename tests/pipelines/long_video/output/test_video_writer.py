"""The growing MP4: readable at any moment, cut and continued, whole after a failed write."""

import errno

import av
import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer, WriterMark


def frame(i, size=(48, 64)):
    picture = np.full((*size, 3), (i * 3) % 200, np.uint8)
    picture[8:20, (i % 40) : (i % 40) + 12] = 255
    return picture


def read(path):
    with av.open(str(path)) as container:
        return [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
def test_frames_come_back_in_order_on_time(tmp_path, codec):
    path = tmp_path / "a.mp4"
    with FragmentedMp4Writer(path, 24, codec=codec, fragment_frames=7) as writer:
        for i in range(30):
            writer.write(frame(i))
    got = read(path)
    assert np.allclose([t for t, _ in got], np.arange(30) / 24, atol=1e-3)
    assert all(abs(float(p.mean()) - float(frame(i).mean())) < 6 for i, (_, p) in enumerate(got))


@pytest.mark.parametrize(("fps", "fragment_frames"), [(29.97, 4), (12.5, 4), (1, 1)])
def test_odd_frame_rates_keep_time(tmp_path, fps, fragment_frames):
    with FragmentedMp4Writer(tmp_path / "a.mp4", fps, fragment_frames=fragment_frames) as writer:
        for i in range(10):
            writer.write(frame(i))
    assert np.allclose([t for t, _ in read(tmp_path / "a.mp4")], np.arange(10) / fps, atol=2e-3)


def test_the_file_plays_while_it_grows_and_loses_only_the_open_fragment(tmp_path):
    path = tmp_path / "a.mp4"
    writer = FragmentedMp4Writer(path, 16, fragment_frames=8)
    for i in range(21):
        writer.write(frame(i))
    assert writer.frames == 21
    # nothing was closed: this is what a killed process leaves
    assert len(read(path)) == 16
    writer.abandon()
    assert len(read(path)) == 16


def test_cut_and_continued_equals_written_straight(tmp_path):
    straight, cut = tmp_path / "straight.mp4", tmp_path / "cut.mp4"
    with FragmentedMp4Writer(straight, 16, fragment_frames=8) as writer:
        for i in range(40):
            writer.write(frame(i))
    first = FragmentedMp4Writer(cut, 16, fragment_frames=8)
    for i in range(16):
        first.write(frame(i))
    mark = first.flush()
    for i in range(16, 30):
        first.write(frame(i + 100))
    first.close()
    with FragmentedMp4Writer(cut, 16, fragment_frames=8, mark=mark) as second:
        for i in range(16, 40):
            second.write(frame(i))
    assert cut.read_bytes() == straight.read_bytes()
    assert len(read(cut)) == 40


def test_odd_sizes_keep_every_row(tmp_path):
    with FragmentedMp4Writer(tmp_path / "a.mp4", 16) as writer:
        writer.write(frame(1, (33, 47)))
    assert read(tmp_path / "a.mp4")[0][1].shape == (33, 47, 3)


def test_closing_twice_and_flushing_nothing_is_fine(tmp_path):
    writer = FragmentedMp4Writer(tmp_path / "a.mp4", 16)
    assert writer.flush() == WriterMark(0, 0)
    writer.close()
    writer.close()


def test_a_failed_write_leaves_the_file_at_its_last_whole_fragment(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    writer = FragmentedMp4Writer(path, 16, fragment_frames=4)
    for i in range(8):
        writer.write(frame(i))

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) > 20:
                return self.file.write(data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    writer._file = FullDisk(writer._file)
    for i in range(8, 11):
        writer.write(frame(i))
    with pytest.raises(OSError, match="No space left"):
        writer.write(frame(11))
    writer.abandon()
    assert len(read(path)) == 8


def test_wrong_input_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(GenAttnError, match="fps must be > 0"):
        FragmentedMp4Writer(path, 0)
    with pytest.raises(GenAttnError, match="fragment_frames must be >= 1"):
        FragmentedMp4Writer(path, 16, fragment_frames=0)
    with pytest.raises(GenAttnError, match="is not in this PyAV build"):
        FragmentedMp4Writer(path, 16, codec="nope")
    with pytest.raises(GenAttnError, match="must hold at least 99 bytes"):
        FragmentedMp4Writer(path, 16, mark=WriterMark(3, 99))
    with FragmentedMp4Writer(path, 16) as writer:
        with pytest.raises(GenAttnError, match=r"uint8 \[H, W, 3\]"):
            writer.write(np.zeros((4, 4, 3), np.float32))
        writer.write(frame(0))
        with pytest.raises(GenAttnError, match="have one size"):
            writer.write(frame(0, (32, 32)))


def test_a_film_carries_what_it_was_made_with(tmp_path):
    from genattn.apps.sampling.output_files import read_metadata

    path = tmp_path / "a.mp4"
    with FragmentedMp4Writer(path, 16, fragment_frames=4, metadata={"prompt": "a cat", "seed": 7}) as writer:
        for i in range(6):
            writer.write(frame(i))
    assert len(read(path)) == 6
    assert read_metadata(path) == {"prompt": "a cat", "seed": 7}
    with FragmentedMp4Writer(path, 16, mark=writer.mark) as writer:
        writer.write(frame(6))
    assert len(read(path)) == 7
    assert read_metadata(path)["seed"] == 7
