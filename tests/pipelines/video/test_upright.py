"""Clips as phones and editors leave them are seen as players show them; what we write says how to show it."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from genattn.pipelines.finetune.data import ClipSource, read_clip
from genattn.pipelines.long_video.output.save_video import save_video
from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer
from genattn.pipelines.long_video.quality.video_metrics import read_video
from genattn.pipelines.video.colours import is_hd


def write(path: Path, picture: np.ndarray, pixel: str | None = None, matrix: tuple[int, int, int, int] | None = None) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv444p"
        if pixel:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if matrix is not None:
        data = bytearray(path.read_bytes())
        at = data.find(b"tkhd") + 8 + (20 if data[data.find(b"tkhd") + 4] == 0 else 32) + 16
        a, b, c, d = (value * 0x10000 for value in matrix)
        struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 0x40000000)
        path.write_bytes(data)


# four quarters: red, green / blue, white
QUARTERS = np.zeros((32, 64, 3), np.uint8)
QUARTERS[:16, :32, 0] = QUARTERS[:16, 32:, 1] = QUARTERS[16:, :32, 2] = 255
QUARTERS[16:, 32:] = 255

SHOWN = {
    (1, 0, 0, 1): QUARTERS,
    (0, 1, -1, 0): np.rot90(QUARTERS, -1),  # a quarter turn clockwise
    (0, -1, 1, 0): np.rot90(QUARTERS),
    (-1, 0, 0, -1): np.rot90(QUARTERS, 2),
    (-1, 0, 0, 1): QUARTERS[:, ::-1],
    (1, 0, 0, -1): QUARTERS[::-1],
    (0, 1, 1, 0): QUARTERS.transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", list(SHOWN))
def test_the_display_matrix_is_followed(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", QUARTERS, matrix=matrix)
    wanted = SHOWN[matrix]
    frames, _ = read_video(tmp_path / "clip.mp4")
    assert frames.shape[1:] == wanted.shape
    assert np.abs(frames[0].astype(int) - wanted).mean() < 8
    clip = read_clip(ClipSource("clip", "x", tmp_path / "clip.mp4"), 2, *wanted.shape[:2])
    assert np.abs(clip[0].astype(int) - wanted).mean() < 8


@pytest.mark.parametrize(("pixel", "turned"), [("2/1", False), ("1/2", False), ("2/1", True)])
def test_pixels_become_square(pixel: str, turned: bool, tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    wide = float(Fraction(pixel))
    inside = (((x - 32) * max(1, wide)) ** 2 + ((y - 32) / min(1, wide)) ** 2) < 20**2  # a disc when it is shown
    write(
        tmp_path / "disc.mp4",
        np.repeat((inside * 255)[..., None], 3, -1).astype(np.uint8),
        pixel,
        (0, 1, -1, 0) if turned else None,
    )
    mask = read_clip(ClipSource("disc", "x", tmp_path / "disc.mp4"), 2, 64, 64)[0, :, :, 0] > 128
    assert abs(int(mask.any(0).sum()) - int(mask.any(1).sum())) <= 3


@pytest.mark.parametrize(("height", "width", "hd"), [(720, 1280, True), (1280, 720, True), (480, 832, False), (64, 64, False)])
@pytest.mark.parametrize("writer", ["film", "clip"])
def test_colours_are_coded_and_tagged_by_size(writer: str, height: int, width: int, hd: bool, tmp_path: Path) -> None:
    assert is_hd(height, width) is hd
    colour = (0, 200, 40)
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, height, width, 3)).copy()
    path = tmp_path / "film.mp4"
    if writer == "clip":
        save_video(frames, path, 16)
    else:
        with FragmentedMp4Writer(path, 16) as film:
            for frame in frames:
                film.write(frame)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert context.colorspace == (1 if hd else 6)
        assert context.color_range == 1
    y, cb, cr = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].mean() for p in frame.planes)
    kr, kb = (0.2126, 0.0722) if hd else (0.299, 0.114)
    y, cb, cr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    shown = [255 * value for value in (red, (y - kr * red - kb * blue) / (1 - kr - kb), blue)]
    assert np.abs(np.array(shown) - colour).max() <= 4
    assert np.abs(read_video(path)[0][0].astype(int) - colour).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(64, 96), (720, 1280)])
@pytest.mark.parametrize("tag", [None, 1, 6])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_read_by_the_matrix_that_the_file_names_or_its_size_implies(
    height: int, width: int, tag: int | None, full: bool, tmp_path: Path
) -> None:
    """Coded by hand: luma and chroma of one colour under each matrix and range."""
    colour = np.array((0, 200, 40)) / 255
    kr, kb = (0.2126, 0.0722) if (tag or (1 if height >= 720 else 6)) == 1 else (0.299, 0.114)
    luma = float(np.dot(colour, (kr, 1 - kr - kb, kb)))
    chroma = (colour[2] - luma) / (2 * (1 - kb)), (colour[0] - luma) / (2 * (1 - kr))
    planes = [255 * luma, *(128 + 255 * c for c in chroma)] if full else [16 + 219 * luma, *(128 + 224 * c for c in chroma)]
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        if tag is not None:
            stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 2 if full else 1
        for _ in range(2):
            frame = av.VideoFrame(width, height, "yuv444p")
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(np.full((plane.height, plane.line_size), round(value), np.uint8).tobytes())
            frame.color_range = 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for pixel in (read_video(path)[0][0, 9, 9], read_clip(ClipSource("c", "x", path), 1, 32, 32)[0, 9, 9]):
        assert np.abs(pixel.astype(int) - (0, 200, 40)).max() <= 3
