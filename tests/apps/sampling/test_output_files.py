"""Files are checked before work, whole when they appear, and carry their settings."""

import os
from pathlib import Path

import numpy as np
import pytest

from genattn.apps.sampling.output_files import VIDEO_SUFFIXES, check_out, read_video, write_image, write_json, write_video
from genattn.errors import GenAttnError
from genattn.pipelines.video import colours


def _clip(frames: int = 7, height: int = 32, width: int = 48) -> np.ndarray:
    ramp = np.linspace(0, 255, frames * height * width * 3).reshape(frames, height, width, 3)
    return ramp.astype(np.uint8)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_video_round_trip(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    clip = _clip(7, *size)
    write_video(tmp_path / f"a{suffix}", clip, 16, {"seed": 3, "prompt": 'a "quoted" prompt'})
    frames, metadata = read_video(tmp_path / f"a{suffix}")
    assert frames.shape == clip.shape
    assert np.abs(frames.astype(int) - clip).mean() < 3
    assert metadata == {"seed": 3, "prompt": 'a "quoted" prompt'}
    assert os.listdir(tmp_path) == [f"a{suffix}"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", _clip(), 16, {"seed": 1})
    before = (tmp_path / "a.mp4").read_bytes()
    coded, seen = colours.coded, []

    def fails(picture: np.ndarray, pix_fmt: str) -> object:
        seen.append(os.listdir(tmp_path))
        if len(seen) == 100:
            raise OSError("no space left")
        return coded(picture, pix_fmt)

    monkeypatch.setattr(colours, "coded", fails)
    with pytest.raises(OSError, match="no space left"):
        write_video(tmp_path / "a.mp4", _clip(120), 16, {"seed": 2})
    assert len(seen[-1]) == 2, "the new film grows beside the old one"
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before
    with pytest.raises(GenAttnError, match=r"floating frames must lie in \[0, 1\], got 0 to 255"):
        write_video(tmp_path / "b.mp4", _clip().astype(np.float64), 16, {})


def test_png_carries_its_settings(tmp_path: Path) -> None:
    from PIL import Image

    write_image(tmp_path / "a.png", _clip()[0], {"seed": 5})
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), _clip()[0])
        assert picture.text["parameters"] == '{"seed": 5}'
    write_image(tmp_path / "a.jpg", _clip()[0], {})
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_check_out_refuses(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "a.mp4", VIDEO_SUFFIXES)
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(GenAttnError, match=r"must end in .mp4, .mkv, .mov, got"):
        check_out(tmp_path / "a.avi", VIDEO_SUFFIXES)
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(GenAttnError, match="is a folder"):
        check_out(tmp_path / "dir.mp4", VIDEO_SUFFIXES)
    (tmp_path / "file").write_text("")
    with pytest.raises(GenAttnError, match="cannot be written"):
        check_out(tmp_path / "file" / "a.mp4", VIDEO_SUFFIXES)
    longest = 255 - 32
    check_out(tmp_path / ("a" * (longest - 4) + ".mp4"), VIDEO_SUFFIXES)
    with pytest.raises(GenAttnError, match=f"must have a file name of at most {longest} bytes, got {longest + 1}; what stands"):
        check_out(tmp_path / ("ä" * 110 + ".mp4"), VIDEO_SUFFIXES)
