"""What pictures are judged by: objectives that need no weights, and the way in for any other.

An objective is a function (samples, prompts) -> one score per sample, higher is better. A sample is a float tensor in
[0, 1]: a picture [3, H, W] or a clip [T, 3, H, W]. `load_objective` finds one by name: "sharpness", "palette:ref.png",
"clip_score:/models/clip", or "module:function" for one's own.

A bare statistic is easily gamed by over-saturation: pair it with "unclipped", or set a floor.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.fingerprint import content_mark

Objective = Callable[[Sequence[torch.Tensor], Sequence[str]], Sequence[float]]
Statistic = Callable[[torch.Tensor], torch.Tensor]


def luma(images: torch.Tensor) -> torch.Tensor:
    """Brightness as seen, [B, 1, H, W], of pictures [B, 3, H, W]."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """Variance of the Laplacian over the variance of the brightness, [B]."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=images.dtype, device=images.device)
    grey = luma(images)
    return F.conv2d(grey, kernel[None, None]).flatten(1).var(1) / (grey.flatten(1).var(1) + 1e-4)


def colourfulness(images: torch.Tensor) -> torch.Tensor:
    """Spread and offset of the opponent colours on a scale of 255, [B] (Hasler and Suesstrunk 2003, eq. 13)."""
    red, green, blue = (images * 255).flatten(2).unbind(1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue])
    return opponents.var(-1).sum(0).sqrt() + 0.3 * opponents.mean(-1).square().sum(0).sqrt()


def contrast(images: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the brightness, [B]."""
    return luma(images).flatten(1).std(1)


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean saturation of the HSV model, [B]."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / (high + 1e-6)).flatten(1).mean(1)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Mean brightness, [B]."""
    return luma(images).flatten(1).mean(1)


def warmth(images: torch.Tensor) -> torch.Tensor:
    """Mean of red minus blue, [B]."""
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


def edge_density(images: torch.Tensor) -> torch.Tensor:
    """Share of pixels whose Sobel gradient exceeds 0.025 a pixel, [B]."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=images.dtype, device=images.device) / 8
    grey = luma(images)
    across, down = F.conv2d(grey, kernel[None, None]), F.conv2d(grey, kernel.t()[None, None])
    return (torch.hypot(across, down) > 0.025).float().flatten(1).mean(1)


def symmetry(images: torch.Tensor) -> torch.Tensor:
    """Minus the difference from the mirror image over the contrast, [B]."""
    grey = luma(images)
    return -(grey - grey.flip(-1)).abs().flatten(1).mean(1) / (grey.flatten(1).std(1) + 1e-4)


def spectral_slope(images: torch.Tensor) -> torch.Tensor:
    """Minus the squared distance of the spectrum's slope from -2, that of natural pictures, [B]."""
    grey = luma(images)[:, 0]
    height, width = grey.shape[-2:]
    window = torch.hann_window(height, device=grey.device)[:, None] * torch.hann_window(width, device=grey.device)
    power = torch.fft.fftshift(torch.fft.fft2((grey - grey.mean((-2, -1), keepdim=True)) * window).abs().square(), dim=(-2, -1))
    y, x = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    ring = torch.hypot(y.float(), x.float()).round().long().to(grey.device)
    inside = (ring >= 2) & (ring < min(height, width) // 2)
    count = torch.bincount(ring[inside])
    sums = torch.zeros(len(grey), len(count), device=grey.device).index_add(1, ring[inside], power[:, inside].float())
    log_power = (sums[:, 2:] / count[2:] + 1e-12).log()
    log_ring = torch.arange(2, len(count), device=grey.device).float().log()
    log_ring = log_ring - log_ring.mean()
    slope = (log_ring * (log_power - log_power.mean(1, keepdim=True))).sum(1) / log_ring.square().sum()
    return -(slope + 2).square()


def unclipped(images: torch.Tensor) -> torch.Tensor:
    """Minus the share of channel values burnt out to white or black, [B]."""
    return -((images <= 2 / 255) | (images >= 253 / 255)).float().flatten(1).mean(1)


def steadiness(clip: torch.Tensor) -> float:
    """Minus the mean change of brightness from frame to frame; 0 for a picture."""
    return 0.0 if clip.ndim == 3 else -luma(clip).diff(dim=0).abs().mean().item()


STATISTICS: dict[str, Statistic] = {
    "sharpness": sharpness,
    "colourfulness": colourfulness,
    "contrast": contrast,
    "saturation": saturation,
    "brightness": brightness,
    "warmth": warmth,
    "edge_density": edge_density,
    "symmetry": symmetry,
    "spectral_slope": spectral_slope,
    "unclipped": unclipped,
}


def per_frame(statistic: Statistic) -> Objective:
    """An objective from a statistic of pictures [B, 3, H, W] -> [B]; clips get the mean over their frames."""

    def objective(samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        return [statistic(as_frames(sample)).mean().item() for sample in samples]

    return objective


def as_frames(sample: torch.Tensor) -> torch.Tensor:
    """A sample as float32 pictures [T, 3, H, W]; raises GenAttnError for another shape."""
    if sample.ndim not in (3, 4) or sample.shape[-3] != 3:
        raise GenAttnError(f"a sample must be [3, H, W] or [T, 3, H, W], got {tuple(sample.shape)}; convert it to RGB")
    return (sample if sample.ndim == 4 else sample[None]).float()


def load_objective(name: str) -> Objective:
    """An objective by name.

    Args:
        name: a statistic ("sharpness", ...) or "steadiness", each with a leading "-" for less of it; "palette:PICTURE" or
            "style:PICTURE" for closeness to a local picture; a scorer with the folder of its weights, "clip_score:PATH",
            "pick_score:PATH", "aesthetic:PATH", "hps:PATH", "image_reward:PATH"; or "module:function" of one's own.

    Returns:
        The objective, checked at every call: finite scores, one per sample.

    Raises:
        GenAttnError: for an unknown name, a missing file, or missing packages.
    """
    flipped, plain = name.startswith("-"), name.removeprefix("-")
    kind, _, where = plain.partition(":")
    if plain in STATISTICS:
        found = per_frame(STATISTICS[plain])
    elif plain == "steadiness":
        found = lambda samples, prompts: [steadiness(sample) for sample in samples]  # noqa: E731
    elif kind in ("palette", "style") and where:
        from genattn.guidance.headhunter.style_objectives import load_reference

        found = load_reference(kind, where)
    elif kind in _SCORERS and where:
        from genattn.guidance.headhunter.scorers import load_scorer

        found = load_scorer(kind, where)
    elif kind and where and kind not in ("palette", "style", *_SCORERS):
        found = _import_objective(kind, where)
    else:
        raise GenAttnError(
            f"objective must be one of {', '.join(STATISTICS)}, steadiness, palette:PICTURE, style:PICTURE, "
            f"{', '.join(f'{s}:PATH' for s in _SCORERS)} or module:function, got {name!r}"
        )
    return checked(_negated(found) if flipped else found, name)


def objective_mark(name: str) -> str:
    """An objective's name with marks of the files that it stands for: a picture, weights, a module; no other name has any."""
    kind, _, where = name.removeprefix("-").partition(":")
    if kind in ("palette", "style", *_SCORERS):
        files = [Path(part).expanduser() for part in where.split("+")]
    else:
        found = None
        with contextlib.suppress(ImportError, ValueError):  # a name that is no module's
            found = importlib.util.find_spec(kind) if where and kind else None
        files = [Path(found.origin)] if found is not None and found.origin else []
    return " ".join([name, *(content_mark(file) for file in files if file.exists())])


_SCORERS = ("clip_score", "pick_score", "aesthetic", "hps", "image_reward")


def checked(objective: Objective, name: str) -> Objective:
    """An objective that refuses to pass on what is no score."""

    def safe(samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        scores = objective(samples, prompts)
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
        if len(scores) != len(samples):
            raise GenAttnError(
                f"objective {name!r} must give one score per sample, got {len(scores)} for {len(samples)}; "
                "check what it returns"
            )
        numbers = [float(score) for score in scores]
        bad = [i for i, score in enumerate(numbers) if not math.isfinite(score)]
        if bad:
            raise GenAttnError(
                f"objective {name!r} must give finite scores, got {numbers[bad[0]]} for sample {bad[0]} "
                f"({prompts[bad[0]]!r}); make it return a number there"
            )
        return numbers

    return safe


def _negated(objective: Objective) -> Objective:
    return lambda samples, prompts: [-float(score) for score in objective(samples, prompts)]


def _import_objective(module: str, function: str) -> Objective:
    found: Objective
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise GenAttnError(f"objective must be an importable module:function, got {module}:{function} ({error})") from error
    if not callable(found):
        raise GenAttnError(f"objective must be a function (samples, prompts) -> scores, got {found!r}; name a function")
    return found
