"""PSNR and SSIM of clips, held against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from genattn.apps.sampling.clip_quality import psnr, ssim
from genattn.errors import GenAttnError


@pytest.mark.parametrize(("size", "noise"), [((11, 11), 3), ((16, 24), 20), ((33, 47), 90)])
def test_they_are_the_known_measures(size: tuple[int, int], noise: int) -> None:
    generator = np.random.default_rng(noise)
    slope = np.linspace(0, 200, size[1])[None, None, :, None] + np.zeros((3, *size, 3))
    reference = slope.astype(np.uint8)
    frames = np.clip(slope + generator.normal(0, noise, slope.shape), 0, 255).astype(np.uint8)
    assert psnr(frames, reference) == pytest.approx(peak_signal_noise_ratio(reference, frames, data_range=255), abs=1e-9)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": -1}
    wanted = np.mean([structural_similarity(a, b, **settings) for a, b in zip(reference, frames)])
    assert ssim(frames, reference) == pytest.approx(wanted, abs=1e-9)


def test_equal_clips() -> None:
    frames = np.full((2, 12, 12, 3), 7, np.uint8)
    assert psnr(frames, frames) == float("inf")
    assert ssim(frames, frames) == pytest.approx(1.0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    frames = np.zeros((2, 12, 12, 3), np.uint8)
    for measure in (psnr, ssim):
        with pytest.raises(GenAttnError, match=r"must have one shape, got \(2, 12, 12, 3\) and \(1, 12, 12, 3\)"):
            measure(frames, frames[:1])
    with pytest.raises(GenAttnError, match="at least 11 pixels high and wide"):
        ssim(frames[:, :10], frames[:, :10])
