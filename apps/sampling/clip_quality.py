"""How near a clip is to the dense one, and what the tiny world's oracle reads in it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from genattn.errors import GenAttnError

Frames = npt.NDArray[np.uint8]
_WINDOW = 11  # 3.5 sigma to each side
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all of uint8 [..., H, W, 3]; infinite for equal inputs.

    Raises GenAttnError for clips of different shapes.
    """
    _same_shape(frames, reference)
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity, Gaussian window of sigma 1.5 (Wang et al. 2004, eq. 13), mean over frames of uint8 [T, H, W, 3].

    Pixels nearer to the border than the window's radius are left out. Raises GenAttnError for clips of different shapes and for
    frames smaller than the window.
    """
    import torch

    _same_shape(frames, reference)
    if min(frames.shape[1:3]) < _WINDOW:
        raise GenAttnError(f"frames must be at least {_WINDOW} pixels high and wide for SSIM, got {frames.shape[1:3]}")
    weights = torch.exp(-0.5 * ((torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2) / 1.5) ** 2)
    weights /= weights.sum()

    def local_mean(planes: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.conv2d(planes, weights.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))

    found = []
    for one, other in zip(frames, reference):
        x, y = (torch.from_numpy(frame.astype(np.float64)).movedim(-1, 0)[:, None] for frame in (one, other))
        mean_x, mean_y = local_mean(x), local_mean(y)
        spread = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
        both = local_mean(x * y) - mean_x * mean_y
        likeness = (2 * mean_x * mean_y + _C1) * (2 * both + _C2) / ((mean_x**2 + mean_y**2 + _C1) * (spread + _C2))
        found.append(likeness.mean().item())
    return float(np.mean(found))


def _same_shape(frames: Frames, reference: Frames) -> None:
    if frames.shape != reference.shape:
        raise GenAttnError(f"both clips must have one shape, got {frames.shape} and {reference.shape}; resize one of them")


def is_tiny_world(model: str | Path | None) -> bool:
    """Whether the model is one of those trained on the procedural world, which the oracle can judge."""
    return model is None or Path(model).name.startswith("tiny-")
