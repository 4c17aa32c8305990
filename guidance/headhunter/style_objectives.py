"""Closeness to a local reference picture, with nothing downloaded.

palette: minus the sliced Wasserstein distance of the colour clouds (Bonneel et al. 2015).
style: minus the relative distance of the Gram matrices of a fixed, seeded random convolution pyramid; random features
carry texture well enough to tell styles apart (Ustyuzhaninov et al., arXiv 1606.00021).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.objectives import Objective, as_frames
from genattn.picture_file import upright_rgb

_DIRECTIONS, _QUANTILES, _PIXELS = 32, 64, 4096
_KERNELS = (3, 5, 7, 11)


class PaletteObjective:
    """Minus the distance of a sample's colours from those of a picture [3, H, W]."""

    def __init__(self, reference: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.directions = F.normalize(torch.randn(_DIRECTIONS, 3, generator=generator), dim=1)
        self.reference = self.profile(as_frames(reference))

    def profile(self, images: torch.Tensor) -> torch.Tensor:
        """Quantiles of the colours along each direction, [B, directions, quantiles]."""
        pixels = images.flatten(2)
        pixels = pixels[..., :: max(1, pixels.shape[-1] // _PIXELS)]
        along = torch.einsum("bcn,kc->bkn", pixels, self.directions.to(pixels))
        return torch.quantile(along, torch.linspace(0, 1, _QUANTILES).to(pixels), dim=-1).movedim(0, -1)

    def __call__(self, samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        distances = [(self.profile(as_frames(s)) - self.reference.to(s.device)).abs().mean() for s in samples]
        return [-distance.item() for distance in distances]


class StyleObjective:
    """Minus the relative Gram distance of a sample from a picture [3, H, W]; 0 for the same texture."""

    def __init__(self, reference: torch.Tensor, channels: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.filters = [torch.randn(channels, 3, k, k, generator=generator) / (3 * k * k) ** 0.5 for k in _KERNELS]
        self.reference = self.grams(as_frames(reference))

    def grams(self, images: torch.Tensor) -> list[torch.Tensor]:
        """One [B, C, C] per octave."""
        found, octave = [], images * 2 - 1
        for weight in self.filters:
            features = F.conv2d(octave, weight.to(octave), padding=weight.shape[-1] // 2).relu().flatten(2)
            found.append(features @ features.transpose(1, 2) / features.shape[-1])
            if min(octave.shape[-2:]) < 2:
                break
            octave = F.avg_pool2d(octave, 2)
        return found

    def __call__(self, samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        return [self._score(as_frames(sample)) for sample in samples]

    def _score(self, frames: torch.Tensor) -> float:
        pairs = zip(self.grams(frames), self.reference, strict=False)
        terms = [(a - b.to(a)).square().flatten(1).mean(1) / b.square().mean().to(a) for a, b in pairs]
        return -torch.stack(terms).sum(0).mean().item()


_PLAIN_MODES = ("L", "RGB", "I;16")  # the others hold indices, inks or alpha


def read_picture(path: str | Path) -> torch.Tensor:
    """A picture file, turned upright, as float32 [3, H, W] in [0, 1]; raises GenAttnError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            plain = picture.mode in _PLAIN_MODES and "transparency" not in picture.info
            pixels = np.asarray(picture if plain else upright_rgb(picture))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GenAttnError(f"a reference must be a readable picture, got {path} ({error}); check the path") from error
    pixels = np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 else pixels
    peak = np.iinfo(pixels.dtype).max if np.issubdtype(pixels.dtype, np.integer) else 1.0
    return torch.from_numpy(pixels.astype(np.float32) / peak).movedim(-1, 0).contiguous()


def load_reference(kind: str, path: str) -> Objective:
    """The "palette" or "style" objective of a picture file."""
    picture = read_picture(path)
    return PaletteObjective(picture) if kind == "palette" else StyleObjective(picture)
