"""Frames of a pipeline as a video file, with PyAV alone: no ffmpeg to install, and no frame lost to a missing one."""

import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from genattn.errors import GenAttnError
from genattn.picture_file import upright_rgb
from genattn.pipelines.video import colours
from genattn.whole_file import whole_file

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
Frames = npt.NDArray[np.uint8]


def save_video(
    frames: Any, path: str | os.PathLike[str], fps: float = 16.0, metadata: Mapping[str, Any] | None = None, crf: int = 12
) -> Path:
    """Write H.264 video to `path` and return it; the file appears when it is whole.

    Args:
        frames: what a video pipeline gives for one clip (`pipe(...).frames[0]`): a list of PIL pictures (on white
            where they are transparent), an array [T, H, W, 3], or a tensor [T, 3, H, W]; uint8, or floating in [0, 1].
        path: ends in .mp4, .mkv or .mov; its folder is made.
        fps: frames per second, in (0, 240].
        metadata: stands as JSON in the file's comment, e.g. prompt and seed.
        crf: quality of x264, 0 (lossless) to 51; lower is better and larger.

    Raises:
        GenAttnError: another suffix, no frames, frames of several sizes or of no known form, values that are not finite, or
            an fps or crf out of range.
    """
    target = Path(path)
    if target.suffix.lower() not in CONTAINERS:
        raise GenAttnError(f"the path must end in {', '.join(CONTAINERS)}, got {str(target)!r}")
    if not (0 < fps <= 240 and Fraction(fps).limit_denominator(1001) > 0):
        raise GenAttnError(f"fps must lie in (0, 240], got {fps}")
    if not 0 <= crf <= 51:
        raise GenAttnError(f"crf must lie in 0 to 51, got {crf}")
    pictures = as_frames(frames)
    with whole_file(target) as part:
        _encode(part, CONTAINERS[target.suffix.lower()], pictures, fps, dict(metadata or {}), crf)
    return target


def as_frames(frames: Any) -> Frames:
    """The frames of one clip as uint8 [T, H, W, 3]; forms and errors as in `save_video`."""
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
        frames = np.moveaxis(frames, 1, -1) if frames.ndim == 4 else frames
    if isinstance(frames, Sequence):
        pictures = [np.asarray(upright_rgb(frame) if isinstance(frame, Image.Image) else frame) for frame in frames]
        sizes = {picture.shape for picture in pictures}
        if len(sizes) > 1:
            raise GenAttnError(f"all frames of a clip must have one size, got {sorted(sizes)}")
        frames = np.stack(pictures) if pictures else np.empty((0, 0, 0, 3))
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[-1] != 3:
        shape = getattr(frames, "shape", type(frames).__name__)
        raise GenAttnError(
            f"frames must be one clip: PIL pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W], got {shape}; "
            "a pipeline's .frames holds one clip per prompt, so take .frames[0]"
        )
    if not frames.size:
        raise GenAttnError("a video needs at least one frame, got none")
    if frames.dtype == np.uint8:
        return frames
    if not np.isfinite(frames).all():
        raise GenAttnError(f"the frames hold {int(np.size(frames) - np.isfinite(frames).sum())} values that are not finite")
    if frames.min() < -1e-3 or frames.max() > 1 + 1e-3:
        raise GenAttnError(f"floating frames must lie in [0, 1], got {frames.min():.3g} to {frames.max():.3g}")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def _encode(part: Path, kind: str, frames: Frames, fps: float, metadata: dict[str, Any], crf: int) -> None:
    with av.open(str(part), "w", format=kind) as container:
        if metadata:
            container.metadata["comment"] = json.dumps(metadata)
        options = {"crf": str(crf), "preset": "medium"}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        # chroma at half resolution needs even sizes
        stream.pix_fmt = "yuv420p" if not (stream.height % 2 or stream.width % 2) else "yuv444p"
        colours.tag(stream, stream.height, stream.width)
        for frame in frames:
            container.mux(stream.encode(colours.coded(frame, stream.pix_fmt)))
        container.mux(stream.encode())
