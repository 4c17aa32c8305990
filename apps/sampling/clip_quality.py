"""How near a clip is to the dense one, and what the tiny world's oracle reads in it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all of uint8 [..., H, W, 3]; infinite for equal inputs."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(frames, reference):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, frames, data_range=255))


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity, Gaussian window of sigma 1.5 (Wang et al. 2004), mean over frames of uint8 [T, H, W, 3]."""
    from skimage.metrics import structural_similarity

    settings: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, **settings) for a, b in zip(reference, frames)]))


def is_tiny_world(model: str | Path | None) -> bool:
    """Whether the model is one of those trained on the procedural world, which the oracle can judge."""
    return model is None or Path(model).name.startswith("tiny-")
