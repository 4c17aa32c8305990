"""Frames in every form that pipelines give, written by PyAV alone, whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import genattn
from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.save_video import as_frames

CLIP = (np.linspace(0, 1, 5 * 16 * 24 * 3).reshape(5, 16, 24, 3) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.astype(np.float32) / 255,
        lambda x: [Image.fromarray(frame) for frame in x],
        lambda x: [Image.fromarray(frame).convert("RGBA") for frame in x],
        lambda x: list(x),
        lambda x: torch.from_numpy(x.astype(np.float32) / 255).permute(0, 3, 1, 2),
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
    ],
    ids=["uint8", "float", "pil", "rgba", "list", "tensor", "uint8-tensor"],
)
def test_every_form_is_the_same_frames(form: Any) -> None:
    assert np.array_equal(as_frames(form(CLIP)), CLIP)


def test_transparent_pictures_stand_on_white() -> None:
    """Black hides under them; an array of four channels may be latents and is refused."""
    clear = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (0, 0, 8, 8))
    frames = as_frames([clear, clear])
    assert (frames[:, :, :8] == (200, 0, 0)).all()
    assert (frames[:, :, 8:] == 255).all()
    with pytest.raises(GenAttnError, match=r"must be one clip: .* got \(1, 8, 16, 4\)"):
        as_frames(np.asarray(clear)[None])


@pytest.mark.parametrize("name", ["a.mp4", "deep/b.mkv", "c.mov"])
def test_the_file_holds_the_frames_and_the_words(tmp_path: Path, name: str) -> None:
    path = genattn.save_video(CLIP, tmp_path / name, fps=12.5, metadata={"prompt": "a cat", "seed": 3})
    with av.open(str(path)) as film:
        tags = {key.lower(): value for key, value in film.metadata.items()}
        assert float(film.streams.video[0].average_rate) == 12.5
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
    assert json.loads(tags["comment"]) == {"prompt": "a cat", "seed": 3}
    assert frames.shape == CLIP.shape
    assert np.abs(frames.astype(int) - CLIP).mean() < 4
    assert os.listdir(path.parent) == [path.name]


def test_odd_sizes_keep_every_row(tmp_path: Path) -> None:
    path = genattn.save_video(CLIP[:, :15, :23], tmp_path / "odd.mp4")
    with av.open(str(path)) as film:
        assert (film.streams.video[0].height, film.streams.video[0].width) == (15, 23)


@pytest.mark.parametrize(
    ("frames", "settings", "message"),
    [
        (CLIP, {"path": "a.gif"}, r"must end in .mp4, .mkv, .mov, got 'a.gif'"),
        (CLIP, {"fps": 0}, r"fps must lie in \(0, 240\], got 0"),
        (CLIP, {"crf": 60}, "crf must lie in 0 to 51, got 60"),
        (CLIP[0], {}, r"frames must be one clip: .* got \(16, 24, 3\); .* take .frames\[0\]"),
        ([], {}, "a video needs at least one frame, got none"),
        ([CLIP[0], CLIP[0, :8]], {}, "all frames of a clip must have one size"),
        (CLIP.astype(np.float32), {}, r"floating frames must lie in \[0, 1\], got 0 to 255"),
        (np.full((1, 16, 16, 3), np.nan), {}, "the frames hold 768 values that are not finite"),
        ("clip", {}, "frames must be one clip"),
    ],
)
def test_what_is_refused_leaves_no_file(tmp_path: Path, frames: Any, settings: dict[str, Any], message: str) -> None:
    path = settings.pop("path", "a.mp4")
    with pytest.raises(GenAttnError, match=message):
        genattn.save_video(frames, tmp_path / path if path == "a.mp4" else path, **settings)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        Path(str(args[0])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genattn.pipelines.long_video.output.save_video._encode", full)
    with pytest.raises(OSError, match="No space left"):
        genattn.save_video(CLIP, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []
