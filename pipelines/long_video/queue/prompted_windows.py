"""The model, its prompts and its guidance as one answerer of windows: what a queue calls.

A model that reads one text per forward gets the prompts of a cross-fade as a mix: of their embeddings (one forward), or of
its answers (one forward per prompt, exact per frame). Models that take a text per frame get just that.
"""

from typing import Any, Literal

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass, Prompt
from genattn.pipelines.long_video.queue.fifo import WindowAnswer, WindowBatch
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid


class PromptedWindows:
    """A `Denoise` for Fifo.

    schedule: prompts by frame. guidance_scale: <= 1 runs no unconditional pass, nor does a model that is told it.
    blend: how a cross-fade is answered, "embeds" or "prediction".
    """

    def __init__(
        self,
        base: FrameDenoiser,
        grid: NoiseGrid,
        schedule: PromptSchedule,
        *,
        negative_prompt: str | None = None,
        guidance_scale: float = 1.0,
        blend: Literal["embeds", "prediction"] = "embeds",
    ) -> None:
        if blend not in ("embeds", "prediction"):
            raise GenAttnError(f"blend must be 'embeds' or 'prediction', got {blend!r}")
        self.base, self.grid, self.schedule, self.guidance_scale, self.blend = base, grid, schedule, guidance_scale, blend
        if negative_prompt and base.tells_guidance:
            raise GenAttnError(
                f"{base.family} is distilled and makes one pass, which reads no negative prompt, got {negative_prompt!r}; "
                "leave it out, or apply NAG"
            )
        self.negative_prompt = negative_prompt
        base.guidance_scale = guidance_scale
        decoder = base.decoder()
        self._first, self._step = decoder.frames_for(1), max(1, decoder.frames_for(3) - decoder.frames_for(2))
        with torch.no_grad():
            self.prompts = [base.encode_prompt(p, negative_prompt, self.guided) for p in schedule.prompts]
        if blend == "embeds" and not base.text_per_frame:
            self._check_lengths()

    def _check_lengths(self) -> None:
        lengths = {tuple(tensor.shape[1] for tensor in prompt.cond.values() if tensor.ndim > 1) for prompt in self.prompts}
        if len(lengths) > 1:
            told = " and ".join(str(shape[0]) for shape in sorted(lengths))
            raise GenAttnError(
                f"embeddings to be mixed must have one length, got prompts of {told} tokens; pass prompt_blend='prediction'"
            )

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional pass."""
        return self.guidance_scale > 1 and not self.base.tells_guidance

    def frame_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """First frame that a latent of each number stands for; latents of the warm-up belong to frame 0."""
        return (self._first + (numbers - 1) * self._step).clamp(min=0)

    def weights(self, batch: WindowBatch) -> torch.Tensor:
        """Weight of every prompt for every latent, [K, F, P]."""
        sigma = self.grid.sigma[batch.levels.clamp(min=-1) + 1]
        return self.schedule.weights(self.frame_of(batch.numbers), sigma / self.grid.sigma.max())

    def __call__(self, batch: WindowBatch) -> WindowAnswer:
        """See fifo.Denoise."""
        return WindowAnswer(self.answer(batch))

    def answer(self, batch: WindowBatch) -> torch.Tensor:
        """The guided answer, [K, C, F, H, W]."""
        weights = self.weights(batch)
        used = [i for i in range(len(self.prompts)) if bool((weights[..., i] > 0).any())]
        if self.base.text_per_frame or self.blend == "embeds" or len(used) == 1:
            return self._guided(batch, [self.prompts[i] for i in used], weights[..., used])
        total: Any = 0
        for i in used:
            alone = self._guided(batch, [self.prompts[i]], torch.ones(*batch.levels.shape, 1))
            total = total + weights[:, None, :, i, None, None].to(alone) * alone
        return total

    def timesteps(self, batch: WindowBatch) -> torch.Tensor:
        """What the model is told, [K, F] on its device."""
        return self.grid.model_timesteps(batch.levels).to(batch.latents.device)

    def where(self, batch: WindowBatch, name: str) -> Pass:
        """The pass that a batch stands for: that of its noisiest latent."""
        level = int(batch.levels.max())
        return Pass(name, self.grid.num_levels - 1 - level, self.grid.num_levels, float(self.grid.sigma[level + 1]))

    def embeds(self, batch: WindowBatch, prompts: list[Prompt], weights: torch.Tensor, pass_name: str) -> Embeds:
        """Embeddings for a batch: [K, ...], or [K * F, ...] for models that take a text per frame."""
        parts = [p.cond if pass_name == "cond" else p.uncond for p in prompts]
        if not self.base.text_per_frame:
            kept = batch.kept().to(weights)[..., None]
            weights = (weights * kept).sum(1) / kept.sum(1)
        rows = weights.reshape(-1, weights.shape[-1])
        return {name: _mix([part[name] for part in parts if part is not None], rows) for name in parts[0] or {}}

    def predict(self, batch: WindowBatch, weights: torch.Tensor, name: str, latents: torch.Tensor) -> torch.Tensor:
        """One pass, "cond" or "uncond", with weights [K, F, P] of all prompts; latents may differ from the batch's own."""
        used = [i for i in range(len(self.prompts)) if bool((weights[..., i] > 0).any())]
        return self._pass(batch, [self.prompts[i] for i in used], weights[..., used], name, latents)

    def guide(self, batch: WindowBatch, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance as the pipeline does it."""
        return self.base.guide(cond, uncond, self.guidance_scale, self.timesteps(batch))

    def _pass(
        self, batch: WindowBatch, prompts: list[Prompt], weights: torch.Tensor, name: str, latents: torch.Tensor
    ) -> torch.Tensor:
        embeds = self.embeds(batch, prompts, weights, name)
        return self.base.predict(latents, self.timesteps(batch), embeds, self.where(batch, name))

    def _guided(self, batch: WindowBatch, prompts: list[Prompt], weights: torch.Tensor) -> torch.Tensor:
        cond = self._pass(batch, prompts, weights, "cond", batch.latents)
        if not self.guided:
            return cond
        return self.guide(batch, cond, self._pass(batch, prompts, weights, "uncond", batch.latents))

    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, JSON-ready."""
        return {
            "prompt": self.schedule.to_text(),
            "fade": self.schedule.fade,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "blend": self.blend,
        }


def _mix(tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    # weights [R, P]; a single prompt is passed on untouched, to the bit
    if len(tensors) == 1:
        return tensors[0].expand(weights.shape[0], *tensors[0].shape[1:])
    if not tensors[0].is_floating_point():
        # masks: everything that one of the prompts uses
        return torch.stack(tensors).amax(0).expand(weights.shape[0], *tensors[0].shape[1:])
    stacked = torch.cat(tensors).float()
    mixed = torch.einsum("rp,p...->r...", weights.to(stacked), stacked)
    return mixed.to(tensors[0].dtype)
