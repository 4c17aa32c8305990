"""What kills long videos shows as a slope: colour, contrast, sharpness and latent statistics per 100 frames, kept in running
sums.

`DriftCorrection` pulls the channel statistics of latents that leave towards those of the first ones (AdaIN, arXiv
1703.06868); since they stay in the queue's head as references, the pull reaches what comes after.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import QueueHook

if TYPE_CHECKING:
    from genattn.pipelines.long_video.queue.fifo import Fifo

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def frame_statistics(frame: np.ndarray) -> dict[str, float]:
    """Statistics of one uint8 frame [H, W, 3]: brightness, saturation and contrast in 0..255, log sharpness.

    sharpness: variance of the 4-neighbour Laplacian of the luma; log10 with a floor of 1e-3.
    """
    picture = frame.astype(np.float32)
    luma = picture @ _LUMA
    top, low = picture.max(-1), picture.min(-1)
    saturation = np.where(top > 0, (top - low) / np.maximum(top, 1e-6), 0) * 255
    edges = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    sharpness = float(np.log10(edges.var() + 1e-3)) if edges.size else 0.0
    colours = {name: float(picture[..., i].mean()) for i, name in enumerate(("red", "green", "blue"))}
    shape = {"brightness": float(luma.mean()), "saturation": float(saturation.mean()), "contrast": float(luma.std())}
    return {**colours, **shape, "log_sharpness": sharpness}


class DriftMonitor:
    """Slopes of all statistics by least squares over everything seen, at constant memory."""

    def __init__(self) -> None:
        # per statistic: count, sum x, sum x^2, sum y, sum x y, with x in units of 100 frames
        self._sums: dict[str, list[float]] = {}
        self.last: dict[str, float] = {}

    def _add(self, at: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            sums = self._sums.setdefault(name, [0.0] * 5)
            for i, part in enumerate((1.0, at, at * at, value, at * value)):
                sums[i] += part
            self.last[name] = value

    def add_frame(self, number: int, frame: np.ndarray) -> None:
        """Take frame `number`, uint8 [H, W, 3]."""
        self._add(number / 100, frame_statistics(frame))

    def add_latent(self, frame: int, latent: torch.Tensor) -> None:
        """Take a latent [C, H, W] that stands for film frame `frame`."""
        values = latent.float()
        self._add(frame / 100, {"latent_mean": float(values.mean()), "latent_std": float(values.std())})

    def slopes(self) -> dict[str, float]:
        """Change per 100 frames of every statistic; 0 until two places were seen."""
        out = {}
        for name, (n, x, xx, y, xy) in self._sums.items():
            spread = n * xx - x * x
            out[name] = (n * xy - x * y) / spread if spread > 1e-12 else 0.0
        return out

    def to_numbers(self) -> dict[str, Any]:
        """State, JSON-ready."""
        return {"sums": self._sums, "last": self.last}

    def load(self, numbers: dict[str, Any]) -> None:
        """Take up a state."""
        self._sums = {name: list(map(float, sums)) for name, sums in numbers["sums"].items()}
        self.last = dict(numbers["last"])


class DriftCorrection(QueueHook):
    """Pull the statistics of leaving latents to those of the first `reference` ones.

    strength: 0 (off) to 1 (full). reference: latents whose mean and std per channel are the goal, >= 1.
    """

    def __init__(self, strength: float, reference: int = 8) -> None:
        if not 0 <= strength <= 1:
            raise GenAttnError(f"strength must be 0 to 1, got {strength}")
        if reference < 1:
            raise GenAttnError(f"reference must be >= 1 latent, got {reference}")
        self.strength, self.reference = strength, reference
        self.count = 0
        self.goal: torch.Tensor | None = None

    def after_step(self, fifo: "Fifo", stepped: torch.Tensor) -> torch.Tensor:
        """See QueueHook.after_step."""
        numbers = fifo.queue.numbers[fifo.queue.leaving].tolist()
        out = stepped.clone()
        for slot, number in zip(range(fifo.queue.leaving.start, fifo.queue.leaving.stop), numbers):
            # copies of the warm-up say nothing about the film
            if number >= 0:
                out[:, :, slot] = self._correct(stepped[:, :, slot])
        return out

    def _correct(self, latent: torch.Tensor) -> torch.Tensor:
        mean, std = latent.mean((2, 3), keepdim=True), latent.std((2, 3), keepdim=True)
        seen = torch.stack([mean, std])
        if self.count < self.reference:
            self.goal = seen if self.goal is None else self.goal + (seen - self.goal) / (self.count + 1)
            self.count += 1
            return latent
        goal = seen if self.goal is None else self.goal.to(latent)
        matched = (latent - mean) / std.clamp(min=1e-6) * goal[1] + goal[0]
        return torch.lerp(latent, matched, self.strength)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See QueueHook.to_tensors."""
        return {} if self.goal is None else {"drift.goal": self.goal}

    def to_numbers(self) -> dict[str, Any]:
        """See QueueHook.to_numbers."""
        return {"drift_count": self.count}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        self.goal, self.count = tensors.get("drift.goal"), int(numbers["drift_count"])

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "drift", "strength": self.strength, "reference": self.reference}


def describe_drift(slopes: dict[str, float], names: Sequence[str] = ("brightness", "contrast", "log_sharpness")) -> str:
    """A short line for a progress bar."""
    short = {"brightness": "bright", "contrast": "contr", "log_sharpness": "sharp", "saturation": "sat"}
    return " ".join(f"{short.get(name, name)} {slopes[name]:+.2f}" for name in names if name in slopes)
