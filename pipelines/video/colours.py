"""The matrix by which players turn a video's luma and chroma into colours, written down in the file.

Untagged video is taken for BT.709 where it is HD and for BT.601 where it is smaller, by most players and not by all; so frames
are coded with the matrix of their size and the file says which. Limited range, as everybody expects of H.264.
"""

from typing import Any

import numpy as np

# numbers of ITU-T H.273; 6 is SMPTE 170M, whose matrix is BT.601's
_BT709, _UNTOLD, _RESERVED, _BT601, _LIMITED = 1, 2, 3, 6, 1


def is_hd(height: int, width: int) -> bool:
    """Whether players expect BT.709."""
    return min(height, width) >= 720 or max(height, width) >= 1280


def matrix_of(frame: Any) -> int:
    """The matrix of a decoded frame: the one its file names, else the one that players take for its size."""
    told = int(frame.colorspace)
    if told not in (_UNTOLD, _RESERVED):
        return told
    return _BT709 if is_hd(frame.height, frame.width) else _BT601


def tag(stream: Any, height: int, width: int) -> None:
    """Say in a PyAV stream which matrix, primaries and transfer its frames have."""
    code = _BT709 if is_hd(height, width) else _BT601
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = code
    context.color_range = _LIMITED


def coded(picture: np.ndarray, pix_fmt: str) -> Any:
    """uint8 [H, W, 3] as an av.VideoFrame in `pix_fmt`, by the matrix of its size."""
    import av
    from av.video.reformatter import Colorspace

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    hd = is_hd(*picture.shape[:2])
    made = frame.reformat(format=pix_fmt, dst_colorspace=Colorspace.ITU709 if hd else Colorspace.ITU601)
    made.colorspace = made.color_primaries = made.color_trc = _BT709 if hd else _BT601
    made.color_range = _LIMITED
    return made
