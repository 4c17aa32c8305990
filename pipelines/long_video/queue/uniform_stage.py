"""A second stage at uniform noise behind the queue, after MIGA (arXiv 2605.18233).

    leaves the queue:    . . . . w w w w        w: waiting, until half a window has come together
    one block:           [c c c c|n n n n]      c: what this stage finished last, clean; n: re-noised, all to one level

In a queue every latent stands at its own noise level, which its model never saw in training. The last few steps are therefore
done once more: half a window at a time is taken back up to level `steps` - 1 and brought down again with all of it at one
level, beside the half before. MIGA holds a whole film for this and moves the windows between rounds; here it streams, so
memory stays flat and a short film is the beginning of a long one. Frames come out half a window later.
"""

from collections.abc import Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import Denoise, Fifo, QueueHook, WindowBatch
from genattn.pipelines.long_video.queue.frame_noise import frame_noise
from genattn.pipelines.long_video.queue.given_frames import GivenFrames
from genattn.pipelines.long_video.queue.latent_queue import CLEAN

# noise of this stage must not be that of the queue's own steps at the same level
_VARIANT = 1_000_000


class UniformStage(QueueHook):
    """See the module. denoise: answers a WindowBatch. window: latents per forward, >= 2. steps: levels done again, >= 1 and at
    most those of the queue. given: frames that stay as they are."""

    def __init__(self, denoise: Denoise, window: int, steps: int, num_levels: int) -> None:
        if window < 2:
            raise GenAttnError(f"a stage at uniform noise needs a window of >= 2 latents, got {window}")
        if not 1 <= steps <= num_levels:
            raise GenAttnError(f"uniform_steps must be 1 to the queue's {num_levels} levels, got {steps}")
        self.denoise, self.steps = denoise, steps
        self.block, self.context = window - window // 2, window // 2
        self.waiting: torch.Tensor | None = None
        self.done: torch.Tensor | None = None
        self.first = 0
        self.given: GivenFrames | None = None

    @property
    def held(self) -> int:
        """See QueueHook.held."""
        return 0 if self.waiting is None else self.waiting.shape[2]

    def pass_on(self, fifo: Fifo, latents: torch.Tensor, numbers: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """See QueueHook.pass_on."""
        if latents.shape[2]:
            if self.waiting is None:
                self.first = numbers[0]
            self.waiting = latents if self.waiting is None else torch.cat([self.waiting, latents], 2)
        out, start = [latents[:, :, :0]], self.first
        while self.waiting is not None and self.waiting.shape[2] >= self.block:
            out.append(self._refined(fifo, self.waiting[:, :, : self.block]))
            rest = self.waiting[:, :, self.block :]
            self.waiting = rest.clone() if rest.shape[2] else None
            self.first += self.block
        return torch.cat(out, 2), list(range(start, self.first))

    def _refined(self, fifo: Fifo, block: torch.Tensor) -> torch.Tensor:
        solver, numbers = fifo.solver, list(range(self.first, self.first + self.block))
        before = block[:, :, :0] if self.done is None else self.done
        beside, top = before.shape[2], torch.full((self.block,), self.steps - 1)
        fresh = frame_noise(fifo.seed, numbers, block, purpose="renoise", variants=[_VARIANT] * self.block)
        sample = solver.grid.add_noise(block, top, fresh)
        state = solver.empty_state(sample)
        told = torch.arange(self.first - beside, self.first + self.block)
        for level in range(self.steps - 1, -1, -1):
            levels = torch.full((self.block,), level)
            whole = torch.cat([torch.full((beside,), CLEAN), levels])
            keep = (slice(beside, beside + self.block),)
            batch = WindowBatch(torch.cat([before, sample], 2), whole[None], told[None], keep, (0,))
            answer = self.denoise(batch if self.given is None else self.given.condition(batch))
            noise = None
            if solver.needs_noise:
                variants = [_VARIANT + level + 1] * self.block
                noise = frame_noise(fifo.seed, numbers, sample, purpose="step", variants=variants)
            sample, state = solver.step(sample, answer.prediction[:, :, beside:].to(sample), levels, state, noise)
        if self.given is not None:
            sample = self.given.placed(sample, torch.tensor(numbers))
        self.done = torch.cat([before, sample], 2)[:, :, -self.context :].clone()
        return sample

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See QueueHook.to_tensors."""
        entries = {"uniform.waiting": self.waiting, "uniform.done": self.done}
        return {name: tensor for name, tensor in entries.items() if tensor is not None}

    def to_numbers(self) -> dict[str, Any]:
        """See QueueHook.to_numbers."""
        return {"uniform.first": self.first}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        self.waiting, self.done = tensors.get("uniform.waiting"), tensors.get("uniform.done")
        self.first = int(numbers["uniform.first"])

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "uniform", "steps": self.steps}
