"""Memory frames: latents that left long ago stand as extra clean frames in front of every window.

In a model whose attention sees all frames of a window, appending a subject's keys adds nothing; what it cannot see is the
past. So a few stored
latents go along at the clean level and their answers are thrown away: a stock forward, a little longer. This is the memory
of MIGA (arXiv 2605.18233) and the attention sink of autoregressive video models in a training-free form.
"""

from collections.abc import Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import Denoise, QueueHook, WindowAnswer, WindowBatch
from genattn.pipelines.long_video.queue.latent_queue import CLEAN


class MemoryFrames(QueueHook):
    """A `Denoise` around another, and the hook that fills its bank.

    head: latents that left but still stand in the queue, and so need no second place in a window.
    anchors: first latents of the film that are kept for good. recent: latents kept from those that left last, `spacing` apart.
    """

    def __init__(self, denoise: Denoise, head: int, anchors: int = 2, recent: int = 2, spacing: int = 8) -> None:
        if anchors < 0 or recent < 0 or anchors + recent == 0:
            raise GenAttnError(f"memory frames need anchors + recent >= 1, neither below 0, got {anchors} and {recent}")
        if spacing < 1:
            raise GenAttnError(f"spacing must be >= 1 latent, got {spacing}")
        self.denoise, self.anchors, self.recent, self.spacing = denoise, anchors, recent, spacing
        self.head = head
        self.bank: dict[int, torch.Tensor] = {}

    def chosen(self) -> list[int]:
        """Frame numbers of the latents that stand in front now, rising."""
        numbers = [n for n in sorted(self.bank) if n <= max(self.bank) - self.head]
        first = numbers[: self.anchors]
        rest = [n for n in numbers if n not in first]
        late = rest[:: -self.spacing][: self.recent] if rest else []
        return sorted({*first, *late})

    def __call__(self, batch: WindowBatch) -> WindowAnswer:
        """See fifo.Denoise."""
        numbers = self.chosen()
        if not numbers:
            return self.denoise(batch)
        extra, rows = len(numbers), batch.latents.shape[0]
        stored = torch.cat([self.bank[n] for n in numbers], 2).to(batch.latents).expand(rows, -1, -1, -1, -1)
        levels = torch.full((rows, extra), CLEAN)
        answer = self.denoise(
            WindowBatch(
                torch.cat([stored, batch.latents], 2),
                torch.cat([levels, batch.levels], 1),
                torch.cat([torch.tensor(numbers).expand(rows, -1), batch.numbers], 1),
                tuple(slice(k.start + extra, k.stop + extra) for k in batch.keep),
                batch.index,
            )
        )
        push = None if answer.push is None else answer.push[:, :, extra:]
        return WindowAnswer(answer.prediction[:, :, extra:], push)

    def on_leave(self, latents: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """See QueueHook.on_leave."""
        for latent, number in zip(latents.split(1, 2), numbers):
            # the first latent of a causal VAE stands for one frame only, unlike all others
            if number > 0:
                self.bank[number] = latent.clone()
        keep = sorted(self.bank)
        span = self.spacing * self.recent + self.head + 1
        for number in keep[self.anchors : max(self.anchors, len(keep) - span)]:
            del self.bank[number]
        return latents

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See QueueHook.to_tensors."""
        return {f"memory.{number}": latent for number, latent in self.bank.items()}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith("memory.")}
        self.bank = {int(name.removeprefix("memory.")): tensor for name, tensor in stored.items()}

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "memory", "anchors": self.anchors, "recent": self.recent, "spacing": self.spacing}
