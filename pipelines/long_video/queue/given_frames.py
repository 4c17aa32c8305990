"""Given frames as a condition: they stand clean in their windows, told timestep 0, and leave as they were given.

This is how image-to-video models that take a timestep per frame are called (Wan 2.2 TI2V, LTX, Cosmos 2.5): the first latents
are the picture's, the rest is noise. In a queue it holds for as long as a given latent is in sight; what comes after continues
the film in the ordinary way.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import Denoise, Fifo, QueueHook, WindowAnswer, WindowBatch
from genattn.pipelines.long_video.queue.latent_queue import CLEAN


class GivenFrames(QueueHook):
    """A `Denoise` around another, and the hook that keeps the queue's own copies.

    given: clean latents [1, C, G, H, W] of the film's numbers 0 .. G - 1; copies that only warm the queue up (numbers below 0)
    are the first of them.
    """

    def __init__(self, denoise: Denoise, given: torch.Tensor, window: int) -> None:
        if not 1 <= given.shape[2] < window:
            raise GenAttnError(
                f"given frames must be 1 to {window - 1} latents, so that a window of {window} has room for more, "
                f"got {given.shape[2]}; give fewer frames"
            )
        self.denoise, self.given = denoise, given.float()

    def placed(self, latents: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Latents [K, C, F, H, W] with the given ones in the place of those numbers [K, F] or [F] that they have."""
        numbers = numbers.expand(latents.shape[0], -1) if numbers.ndim == 1 else numbers
        known = numbers < self.given.shape[2]
        source = self.given[0].to(latents)[:, numbers.clamp(0, self.given.shape[2] - 1).to(latents.device)].transpose(0, 1)
        return torch.where(known[:, None, :, None, None].to(latents.device), source, latents)

    def condition(self, batch: WindowBatch) -> WindowBatch:
        """The batch with the given latents clean in their places."""
        known = batch.numbers < self.given.shape[2]
        if not bool(known.any()):
            return batch
        levels = torch.where(known, CLEAN, batch.levels)
        return replace(batch, latents=self.placed(batch.latents, batch.numbers), levels=levels)

    def __call__(self, batch: WindowBatch) -> WindowAnswer:
        """See fifo.Denoise."""
        return self.denoise(self.condition(batch))

    def after_step(self, fifo: Fifo, stepped: torch.Tensor) -> torch.Tensor:
        """See QueueHook.after_step."""
        return self.placed(stepped, fifo.queue.numbers)

    def on_leave(self, latents: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """See QueueHook.on_leave: whatever other hooks did, a given latent leaves as it came."""
        return self.placed(latents, torch.tensor(list(numbers), dtype=torch.int64)) if numbers else latents

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See QueueHook.to_tensors."""
        return {"given.latents": self.given}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        self.given = tensors["given.latents"]

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "given", "latents": self.given.shape[2]}
