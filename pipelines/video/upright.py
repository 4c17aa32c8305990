"""A decoded frame as a player shows it: turned and mirrored by the display matrix (phones film lying on their side), and with
square pixels."""

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from genattn.pipelines.video.colours import matrix_of

Picture = npt.NDArray[np.uint8]
_YUV = ("yuv", "nv", "p0")  # what has a matrix; a GIF's frames have none


def shown_size(frame: Any, pixel: Fraction | None) -> tuple[int, int]:
    """(height, width) in square pixels, before it is turned: anamorphic frames are widened or heightened, never reduced.

    frame: av.VideoFrame. pixel: width over height of its pixels; None or 0 where the file does not tell.
    """
    aspect = float(pixel) if pixel else 1.0
    height, width = frame.height, frame.width
    return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def upright(frame: Any, height: int | None = None, width: int | None = None) -> Picture:
    """uint8 [H, W, 3] as shown. height, width: of the picture when it stands upright; the frame's own where None."""
    matrix = _matrix(frame)
    turned = matrix is not None and abs(matrix[0, 0]) < abs(matrix[0, 1])
    if height is None or width is None:
        tall, wide = frame.height, frame.width
    else:
        tall, wide = (width, height) if turned else (height, width)
    colours = {"src_colorspace": matrix_of(frame)} if frame.format.name.startswith(_YUV) else {}
    picture: Picture = frame.reformat(width=wide, height=tall, format="rgb24", **colours).to_ndarray()
    if matrix is None:
        return picture
    if turned:
        picture = picture.transpose(1, 0, 2)
    across, down = (matrix[1, 0], matrix[0, 1]) if turned else (matrix[0, 0], matrix[1, 1])
    picture = picture[:, ::-1] if across < 0 else picture
    return np.ascontiguousarray(picture[::-1] if down < 0 else picture)


def is_turned(frame: Any) -> bool:
    """Whether the display matrix exchanges height and width."""
    matrix = _matrix(frame)
    return matrix is not None and bool(abs(matrix[0, 0]) < abs(matrix[0, 1]))


def pixel_of(stream: Any) -> Fraction | None:
    """Width over height of the pixels of a video stream."""
    found = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return Fraction(found) if found else None


def _matrix(frame: Any) -> npt.NDArray[np.int32] | None:
    """The display matrix's part [[a, b], [c, d]]: x' = a x + c y, y' = b x + d y; None where there is none, or it is broken."""
    data = next((data for data in frame.side_data if str(getattr(data, "type", "")).endswith("DISPLAYMATRIX")), None)
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), dtype=np.int32)
    return matrix.reshape(3, 3)[:2, :2] if matrix.size == 9 and matrix.any() else None
