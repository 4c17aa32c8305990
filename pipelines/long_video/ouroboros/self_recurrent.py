"""Subject windows: every window with its subject watched, remembered, and where asked pulled back to the memory
(Ouroboros-Diffusion, 3.3).

    memory  <-  decay memory + (1 - decay) subject of the cleanest window         "past informs present", eq. 5
    g        =  gradient of |subject of this window - memory|^2 by the latents    in the noisier windows, every few ticks
    step        moves against g along its noise direction only                    eq. 6, in Fifo

The paper leaves open the weights and the scale. Here the loss is the mean over layers of the squared distance over the
squared length of the memory, and with scale_by="relative" the push has, where it is strongest, `scale` times the size of the
model's answer, whatever the model; "published" takes the gradient as it is. The gradient stands on the subject alone, so one
scaled by its mean over all places would overrun a small subject.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.ouroboros.subject_attention import SubjectWatch
from genattn.pipelines.long_video.queue.fifo import QueueHook, WindowAnswer, WindowBatch
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows

if TYPE_CHECKING:
    from genattn.pipelines.long_video.queue.fifo import Fifo


@dataclass(frozen=True)
class GuidanceSettings:
    """scale: 0 is off. every: ticks between guided ones, >= 1. share: of the windows, from the noisy end, (0, 1].

    decay: of the memory per tick, [0, 1]; 0 keeps the last only, 1 the first only. on_switch: what a new prompt does to the
    memory.
    """

    scale: float = 0.0
    every: int = 1
    share: float = 0.5
    decay: float = 0.9
    scale_by: Literal["relative", "published"] = "relative"
    on_switch: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise GenAttnError(f"guidance must be >= 0, got {self.scale}")
        if self.every < 1:
            raise GenAttnError(f"guidance_every must be >= 1 tick, got {self.every}")
        if not 0 < self.share <= 1:
            raise GenAttnError(f"guidance_share must be above 0 and at most 1, got {self.share}")
        if not 0 <= self.decay <= 1:
            raise GenAttnError(f"memory_decay must be 0 to 1, got {self.decay}")
        if self.scale_by not in ("relative", "published"):
            raise GenAttnError(f"guidance_scale_by must be 'relative' or 'published', got {self.scale_by!r}")
        if self.on_switch not in ("keep", "reset"):
            raise GenAttnError(f"memory_on_switch must be 'keep' or 'reset', got {self.on_switch!r}")


def subject_loss(features: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over layers and frames of |subject - memory|^2 / |memory|^2; features [F, D] and memory [D] by layer."""
    terms = []
    for name, seen in features.items():
        if name in memory:
            goal = memory[name].to(seen)
            terms.append((seen - goal).square().sum(-1).mean() / goal.square().sum().clamp(min=1e-12))
    return torch.stack(terms).mean() if terms else torch.zeros(())


class SubjectWindows(QueueHook):
    """A `Denoise` around PromptedWindows, and the hook that carries its memory. tokens: the subject's, one list per prompt."""

    def __init__(
        self, windows: PromptedWindows, watch: SubjectWatch, tokens: list[list[int]], count: int, guidance: GuidanceSettings
    ) -> None:
        if windows.blend != "embeds":
            raise GenAttnError(f"subject masks need one text per window, got prompt_blend={windows.blend!r}; use 'embeds'")
        self.windows, self.watch, self.tokens, self.count, self.guidance = windows, watch, tokens, count, guidance
        self.memory: dict[str, torch.Tensor] = {}
        self.prompt = 0
        self.ticks = 0
        self.losses: list[float] = []

    def __call__(self, batch: WindowBatch) -> WindowAnswer:
        """See fifo.Denoise; masks belong to one window, so a batch is answered window by window."""
        answers = [self._one(_row(batch, i)) for i in range(len(batch.index))]
        pushes = [torch.zeros_like(a.prediction) if a.push is None else a.push for a in answers]
        used = any(a.push is not None for a in answers)
        return WindowAnswer(torch.cat([a.prediction for a in answers]), torch.cat(pushes) if used else None)

    def _one(self, batch: WindowBatch) -> WindowAnswer:
        windows, (frames, *size) = self.windows, batch.latents.shape[2:]
        weights = windows.weights(batch)
        prompt = int(weights.mean((0, 1)).argmax())
        guided = self._is_guided(batch.index[0])
        wanted = guided or batch.index[0] == self.count - 1
        self.watch.begin(frames, (size[0], size[1]), self.tokens[prompt], collect=wanted)
        try:
            cond, push = self._conditional(batch, weights, guided)
            mask, features = self.watch.mask(), self.watch.features
        finally:
            self.watch.end()
        if batch.index[0] == self.count - 1:
            self._remember(features, prompt)
        if not windows.guided:
            return WindowAnswer(cond, push)
        self.watch.begin(frames, (size[0], size[1]), None, mask)
        try:
            uncond = windows.predict(batch, weights, "uncond", batch.latents)
        finally:
            self.watch.end()
        return WindowAnswer(windows.guide(batch, cond, uncond), push)

    def _is_guided(self, index: int) -> bool:
        settings = self.guidance
        noisy = index < max(1, round(self.count * settings.share))
        return settings.scale > 0 and noisy and bool(self.memory) and self.ticks % settings.every == 0

    def _conditional(self, batch: WindowBatch, weights: torch.Tensor, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not guided:
            return self.windows.predict(batch, weights, "cond", batch.latents), None
        with torch.enable_grad():
            latents = batch.latents.detach().requires_grad_()
            cond = self.windows.predict(batch, weights, "cond", latents)
            loss = subject_loss(self.watch.features, self.memory)
            if not loss.requires_grad:
                return cond.detach(), None
            (gradient,) = torch.autograd.grad(loss, latents)
        self.losses.append(float(loss.detach()))
        return cond.detach(), self._scaled(gradient, cond.detach())

    def _scaled(self, gradient: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        if self.guidance.scale_by == "published":
            return self.guidance.scale * gradient
        # by place: the strongest of all; by channel: the middle one, as some models carry a few channels of another size
        strongest = gradient.square().mean(1).sqrt().amax().clamp(min=1e-20)
        size = answer.square().mean((0, 2, 3, 4)).sqrt().median()
        return self.guidance.scale * size / strongest * gradient

    def _remember(self, features: dict[str, torch.Tensor], prompt: int) -> None:
        if prompt != self.prompt and self.guidance.on_switch == "reset":
            self.memory = {}
        self.prompt = prompt
        for name, seen in features.items():
            new = seen.detach().float().mean(0)
            old = self.memory.get(name)
            self.memory[name] = new if old is None else self.guidance.decay * old + (1 - self.guidance.decay) * new

    def after_step(self, fifo: "Fifo", stepped: torch.Tensor) -> torch.Tensor:
        """See QueueHook.after_step; counts ticks."""
        self.ticks += 1
        self.losses = self.losses[-64:]
        return stepped

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See QueueHook.to_tensors."""
        return {f"subject.{name}": tensor for name, tensor in self.memory.items()}

    def to_numbers(self) -> dict[str, Any]:
        """See QueueHook.to_numbers."""
        return {"subject_ticks": self.ticks, "subject_prompt": self.prompt}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """See QueueHook.load."""
        self.memory = {n.removeprefix("subject."): t for n, t in tensors.items() if n.startswith("subject.")}
        self.ticks, self.prompt = int(numbers["subject_ticks"]), int(numbers["subject_prompt"])

    def settings(self) -> dict[str, Any]:
        """See QueueHook.settings."""
        return {"hook": "subject", "attend": self.watch.attend, "threshold": self.watch.threshold, **vars(self.guidance)}


def _row(batch: WindowBatch, i: int) -> WindowBatch:
    one = slice(i, i + 1)
    return WindowBatch(batch.latents[one], batch.levels[one], batch.numbers[one], batch.keep[one], batch.index[one])
