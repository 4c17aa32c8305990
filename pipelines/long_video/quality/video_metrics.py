"""Measures of a video that need no learned model; VBench's formulas where those need none (arXiv 2311.17982), optical flow
from OpenCV.

    temporal_flickering     1 - mean |frame - next| / 255                                     as VBench
    motion_smoothness       odd frames rebuilt from their neighbours by half-way flow         VBench with flow for AMT
    dynamic_degree          mean of the strongest 5 % of flow per frame pair, in pixels; and VBench's yes or no
    subject_consistency     mean cosine to the previous and to the first frame, inside a mask of what moves
    background_consistency  the same outside the mask
    drift                   change per 100 frames of colour, contrast and sharpness
    seams, repetition       frames whose step stands out of its neighbourhood; the lag at which the film repeats itself

Whole-frame hand-made features do not notice a swapped subject, masked ones do: hence the mask. The cosines live on another
scale than those of DINO or CLIP features and are for comparing films made alike, not for a leaderboard.
"""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.quality.drift import DriftMonitor
from genattn.pipelines.video.film_stream import film_of
from genattn.pipelines.video.upright import upright

Video = np.ndarray  # uint8 [T, H, W, 3]
_GRID = 4


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise GenAttnError("optical flow needs OpenCV, which is not installed; pip install opencv-python-headless") from error
    return cv2


def check_video(video: Video, least: int = 2) -> Video:
    """The video itself, or GenAttnError when it is not uint8 [T, H, W, 3] with at least `least` frames of 8 x 8."""
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        shown = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise GenAttnError(f"a video must be uint8 [T, H, W, 3], got {shown}")
    if len(video) < least or min(video.shape[1:3]) < 8:
        raise GenAttnError(f"a video must have >= {least} frames of at least 8 x 8 pixels, got {video.shape}")
    return video


def read_video(path: str | os.PathLike[str], max_frames: int | None = None) -> tuple[Video, float]:
    """(uint8 frames [T, H, W, 3], frames per second) of a file that PyAV can read."""
    import av

    if not Path(path).is_file():
        raise GenAttnError(f"{path} is no file; give a video that exists")
    try:
        with av.open(os.fspath(path)) as container:
            film = film_of(container)
            rate = film.average_rate
            frames = []
            for frame in container.decode(film):
                frames.append(upright(frame))
                if max_frames is not None and len(frames) >= max_frames:
                    break
    except (av.FFmpegError, GenAttnError) as error:
        raise GenAttnError(f"{path} could not be read as a video ({error})") from error
    if not frames:
        raise GenAttnError(f"{path} holds no frames")
    return np.stack(frames), float(rate or 0)


def temporal_flickering(video: Video) -> float:
    """1 minus the mean absolute difference of neighbouring frames over 255; 1 is a still. VBench's own formula."""
    check_video(video)
    steps = [np.abs(a.astype(np.float32) - b).mean() for a, b in pairwise(video)]
    return float(1 - np.mean(steps) / 255)


class _Flow:
    """Dense inverse search at its middle setting; [H, W, 2] in pixels from one picture to another."""

    def __init__(self) -> None:
        self.cv2 = _cv2()
        self.search = self.cv2.DISOpticalFlow_create(self.cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        grey = [self.cv2.cvtColor(f, self.cv2.COLOR_RGB2GRAY) for f in (a, b)]
        return np.asarray(self.search.calc(grey[0], grey[1], None))

    def warp(self, picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
        """`picture` read at every place moved by `flow`."""
        height, width = flow.shape[:2]
        y, x = np.mgrid[:height, :width].astype(np.float32)
        out = self.cv2.remap(
            picture, x + flow[..., 0], y + flow[..., 1], self.cv2.INTER_LINEAR, borderMode=self.cv2.BORDER_REPLICATE
        )
        return np.asarray(out, dtype=np.float32)


def motion_smoothness(video: Video) -> float:
    """1 minus the error of odd frames rebuilt from their neighbours, over 255; higher is smoother. Needs 3 frames."""
    check_video(video, 3)
    flow, errors = _Flow(), []
    for i in range(0, len(video) - 2, 2):
        a, b = video[i], video[i + 2]
        middle = (flow.warp(a, 0.5 * flow(b, a)) + flow.warp(b, 0.5 * flow(a, b))) / 2
        errors.append(np.abs(middle - video[i + 1]).mean())
    return float(1 - np.mean(errors) / 255)


def dynamic_degree(video: Video, fps: float = 8.0) -> tuple[float, bool]:
    """(mean over frame pairs of the mean of the strongest 5 % of flow, in pixels; whether VBench would call it dynamic).

    The film is thinned to about 8 frames a second first, as VBench does; fps: of the film.
    """
    # a clip of a few frames is not thinned to a still
    video = check_video(video)[:: max(1, min(round(fps / 8), len(video) - 1))]
    flow, strengths = _Flow(), []
    top = max(1, int(0.05 * video.shape[1] * video.shape[2]))
    for a, b in pairwise(video):
        length = np.linalg.norm(flow(a, b), axis=-1).ravel()
        strengths.append(np.partition(length, -top)[-top:].mean())
    threshold = 6.0 * min(video.shape[1:3]) / 256
    enough = max(1, round(4 * len(video) / 16))
    return float(np.mean(strengths)), bool((np.array(strengths) > threshold).sum() >= enough)


def motion_masks(video: Video, threshold: float = 18.0) -> np.ndarray:
    """bool [T, H, W]: places that differ from the film's median picture by more than `threshold` in some channel."""
    check_video(video)
    still = np.median(video[:: max(1, len(video) // 32)], 0)
    return np.stack([np.abs(frame - still).max(-1) > threshold for frame in video.astype(np.float32)])


def _edges(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    luma = frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    dy, dx = np.gradient(luma)
    return np.arctan2(dy, dx) % np.pi, np.hypot(dx, dy)


def _unit(parts: Sequence[np.ndarray]) -> np.ndarray:
    vector = np.concatenate([np.ravel(p) for p in parts]).astype(np.float64)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def subject_features(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Unit vector of colour (6 x 6 x 6, square-rooted) and edge directions (9) inside a bool mask [H, W]."""
    colours = frame[mask].astype(np.float32)
    counts = np.histogramdd(colours, bins=(6, 6, 6), range=[(0, 256)] * 3)[0] / max(len(colours), 1)
    angle, strength = _edges(frame)
    edges = np.histogram(angle[mask], 9, (0, np.pi), weights=strength[mask])[0] / max(len(colours), 1) / 255
    return _unit([np.sqrt(counts), edges])


def background_features(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Unit vector of mean and spread of colour and of edge directions on a 4 x 4 grid, outside a bool mask [H, W]."""
    angle, strength = _edges(frame)
    parts: list[np.ndarray] = []
    rows, columns = (np.linspace(0, n, _GRID + 1).astype(int) for n in frame.shape[:2])
    for i in range(_GRID):
        for j in range(_GRID):
            cell = np.s_[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            seen = ~mask[cell]
            if not seen.any():
                parts += [np.zeros(9), np.zeros(3), np.zeros(3)]
                continue
            colours = frame[cell][seen].astype(np.float32) / 255
            edges = np.histogram(angle[cell][seen], 9, (0, np.pi), weights=strength[cell][seen])[0] / (64 * seen.sum())
            # centred, so that two pictures are not alike for being bright
            parts += [edges, 2 * colours.mean(0) - 1, colours.std(0)]
    return _unit(parts)


def consistency(features: Sequence[np.ndarray]) -> float:
    """VBench's consistency: mean over frames of (cosine to the previous + cosine to the first) / 2, negatives as 0."""
    unit = [f / max(float(np.linalg.norm(f)), 1e-12) for f in features]
    pairs = [(max(0.0, float(b @ a)) + max(0.0, float(b @ unit[0]))) / 2 for a, b in pairwise(unit)]
    return float(np.mean(pairs))


def subject_consistency(video: Video, masks: np.ndarray | None = None, least: int = 16) -> float | None:
    """Consistency inside the masks (bool [T, H, W]; those of `motion_masks` when None).

    None when fewer than 3 frames have `least` masked pixels: there is no subject to follow.
    """
    masks = motion_masks(video) if masks is None else _check_masks(video, masks)
    shown = [i for i in range(len(video)) if masks[i].sum() >= least]
    if len(shown) < 3:
        return None
    return consistency([subject_features(video[i], masks[i]) for i in shown])


def background_consistency(video: Video, masks: np.ndarray | None = None) -> float:
    """Consistency outside the masks (bool [T, H, W]; those of `motion_masks` when None)."""
    masks = motion_masks(video) if masks is None else _check_masks(video, masks)
    return consistency([background_features(frame, mask) for frame, mask in zip(video, masks)])


def _check_masks(video: Video, masks: np.ndarray) -> np.ndarray:
    check_video(video)
    if masks.dtype != np.bool_ or masks.shape != video.shape[:3]:
        raise GenAttnError(f"masks must be bool {video.shape[:3]} like the video, got {masks.dtype} {masks.shape}")
    return masks


def drift(video: Video) -> dict[str, float]:
    """Change per 100 frames of colour, brightness, saturation, contrast and log sharpness."""
    monitor = DriftMonitor()
    for i, frame in enumerate(check_video(video)):
        monitor.add_frame(i, frame)
    return monitor.slopes()


def seams(video: Video, reach: int = 4, ratio: float = 1.8, spread: float = 6.0) -> list[int]:
    """Frames that begin with a jump: their step is `ratio` times the median of the steps around (`reach` each side) and stands
    `spread` robust standard deviations above it."""
    check_video(video)
    steps = np.array([np.abs(a.astype(np.float32) - b).mean() for a, b in pairwise(video)])
    out = []
    for i, step in enumerate(steps):
        around = np.delete(steps[max(0, i - reach) : i + reach + 1], min(i, reach))
        if not len(around):
            continue
        middle = np.median(around)
        deviation = np.median(np.abs(around - middle)) + 0.02 * middle + 1e-3
        if step > ratio * middle and step - middle > spread * 1.4826 * deviation:
            out.append(i + 1)
    return out


def repetition(video: Video, least: int = 8) -> tuple[int, float] | None:
    """(lag in frames, strength up to 1) of the strongest self-similarity at a lag >= `least`; None for films too short to
    tell."""
    check_video(video)
    if len(video) // 2 <= least:
        return None
    nothing = np.zeros(video.shape[1:3], dtype=bool)
    features = np.stack([background_features(frame, nothing) for frame in video])
    features = features - features.mean(0)
    products = features @ features.T
    # cosines, so that a frame that stands far out does not speak for all
    norms = np.sqrt(np.maximum(np.diag(products), 1e-18))
    cosines = products / norms[:, None] / norms[None]
    by_lag = np.array([np.diagonal(cosines, k).mean() for k in range(len(video) // 2)])
    lag = least + int(np.argmax(by_lag[least:]))
    return lag, float(by_lag[lag])


def measure(video: Video | str | os.PathLike[str], fps: float | None = None, masks: np.ndarray | None = None) -> dict[str, Any]:
    """All measures of a film, JSON-ready. video: uint8 [T, H, W, 3] or a file. fps: of the film, read from a file when None."""
    if not isinstance(video, np.ndarray):
        video, rate = read_video(video)
        fps = fps or rate
    check_video(video, 3)
    masks = motion_masks(video) if masks is None else _check_masks(video, masks)
    strength, dynamic = dynamic_degree(video, fps or 8.0)
    again = repetition(video)
    return {
        "frames": len(video),
        "fps": fps,
        "temporal_flickering": temporal_flickering(video),
        "motion_smoothness": motion_smoothness(video),
        "dynamic_degree": strength,
        "is_dynamic": dynamic,
        "subject_consistency": subject_consistency(video, masks),
        "background_consistency": background_consistency(video, masks),
        "drift_per_100_frames": drift(video),
        "seams": seams(video),
        "repetition_lag": None if again is None else again[0],
        "repetition_strength": None if again is None else again[1],
    }
