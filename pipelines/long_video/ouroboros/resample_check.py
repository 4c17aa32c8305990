"""A check without gradients: a latent that has parted from the one before it is drawn again (self-reflection, MIGA, arXiv
2605.18233).

Some levels below the top a latent has its layout. There its channel means are compared with those of its cleaner neighbour;
when their cosine has dropped by more than `tolerance` below its running mean, the latent is replaced by its neighbour taken
back up to the level with fresh noise, the best of a few candidates. No forward of the model is spent.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import QueueHook
from genattn.pipelines.long_video.queue.frame_noise import frame_noise

if TYPE_CHECKING:
    from genattn.pipelines.long_video.queue.fifo import Fifo


class ResampleCheck(QueueHook):
    """depth: levels below the top at which a latent is judged, >= 1. tolerance: allowed drop of the cosine. candidates: >=
    1."""

    def __init__(self, depth: int = 10, tolerance: float = 0.01, candidates: int = 3) -> None:
        if depth < 1:
            raise GenAttnError(f"resample depth must be >= 1 level, got {depth}")
        if tolerance < 0:
            raise GenAttnError(f"resample tolerance must be >= 0, got {tolerance}")
        if candidates < 1:
            raise GenAttnError(f"resample candidates must be >= 1, got {candidates}")
        self.depth, self.tolerance, self.candidates = depth, tolerance, candidates
        self.mean: float | None = None
        self.resampled = 0

    def after_step(self, fifo: "Fifo", stepped: torch.Tensor) -> torch.Tensor:
        """See QueueHook.after_step."""
        shape = fifo.queue.shape
        before = shape.num_levels - 1 - min(self.depth, shape.num_levels - 1)
        if before < 1:
            return stepped
        # the group that was at level `before` has just arrived one lower; its neighbour is the last of the group below
        first = shape.head + before * shape.latents_per_level
        out = stepped.clone()
        for slot in range(first, first + shape.latents_per_level):
            self._judge(fifo, out, slot, before - 1, first - 1)
        return out

    def _judge(self, fifo: "Fifo", out: torch.Tensor, slot: int, level: int, neighbour: int) -> None:
        agreement = _agreement(out[:, :, slot], out[:, :, neighbour])
        if self.mean is not None and agreement < self.mean - self.tolerance:
            number = int(fifo.queue.numbers[slot])
            best = max(
                (self._candidate(fifo, out, neighbour, level, number, c) for c in range(self.candidates)), key=lambda p: p[0]
            )
            out[:, :, slot] = best[1]
            fifo.forget(slot)
            self.resampled += 1
            return
        self.mean = agreement if self.mean is None else 0.9 * self.mean + 0.1 * agreement

    def _candidate(
        self, fifo: "Fifo", out: torch.Tensor, neighbour: int, level: int, number: int, c: int
    ) -> tuple[float, torch.Tensor]:
        source = out[:, :, neighbour : neighbour + 1]
        fresh = frame_noise(fifo.seed, [number], source, purpose="candidate", variants=[c])
        # after the step the neighbour stands one level below this one's
        made = fifo.solver.grid.renoise(source, torch.tensor([level - 1]), torch.tensor([level]), fresh)[:, :, 0]
        return _agreement(made, source[:, :, 0]), made

    def to_numbers(self) -> dict[str, Any]:
        """See QueueHook.to_numbers."""
        return {"resample_mean": self.mean, "resampled": self.resampled}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        self.mean, self.resampled = numbers["resample_mean"], int(numbers["resampled"])

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "resample", "depth": self.depth, "tolerance": self.tolerance, "candidates": self.candidates}


def _agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    # channel means over a coarse grid, so that layout counts and detail does not
    coarse = [F.adaptive_avg_pool2d(x.float(), (4, 4)).flatten() for x in (a, b)]
    return float(F.cosine_similarity(coarse[0], coarse[1], dim=0))
