"""Wan 2.1 and 2.2 text-to-video: a timestep per token, as the stock forward takes it; two experts routed by level.

The stock transformer accepts timesteps [B, tokens] (it was added for TI2V-5B, whose first frame is clean). In Wan 2.2 A14B
noisy latents belong to one expert and clean ones to the other; a window that spans the boundary goes through both and each
latent keeps its own.
"""

from typing import Any, ClassVar

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import (
    Embeds,
    FrameDenoiser,
    Pass,
    Prompt,
    encode_to_length,
    why_not_one_latent_a_patch,
)
from genattn.pipelines.long_video.output.stream_decode import CausalCacheDecoder, StreamDecoder


class WanFrames(FrameDenoiser):
    """WanPipeline. guidance_scale_2: guidance of the low-noise expert; that of the high-noise one when None."""

    family: ClassVar[str] = "Wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    route: ClassVar[str] = "per token, stock forward"
    decode: ClassVar[str] = "cached, exact"
    note: ClassVar[str] = "2.2 A14B: experts routed by level"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.guidance_scale_2: float | None = None

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
        reason = next(filter(None, map(why_not_one_latent_a_patch, models)), None)
        if reason is not None:
            return reason
        if any(m.config.image_dim is not None for m in models):
            return "this Wan transformer expects an image embedding (image_dim is set); use a text-to-video checkpoint"
        return None

    @property
    def _boundary(self) -> float | None:
        ratio = self.pipe.config.get("boundary_ratio")
        return None if ratio is None else ratio * self.pipe.scheduler.config.num_train_timesteps

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor, patch = self.pipe.vae_scale_factor_spatial, next(iter(self.models.values())).config.patch_size
        if height % (factor * patch[1]) or width % (factor * patch[2]):
            raise GenAttnError(
                f"height and width must be multiples of {factor * patch[1]} and {factor * patch[2]} for this model, "
                f"got {height} x {width}"
            )
        return height // factor, width // factor

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        return encode_to_length(self, prompt, negative_prompt, guided)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        boundary, first, second = self._boundary, self.pipe.transformer, self.pipe.transformer_2
        if boundary is None or second is None or first is None:
            return self._forward(first if first is not None else second, latents, timesteps, embeds, where)
        noisy = timesteps >= boundary
        if bool(noisy.all()):
            return self._forward(first, latents, timesteps, embeds, where)
        if not bool(noisy.any()):
            return self._forward(second, latents, timesteps, embeds, where)
        high = self._forward(first, latents, timesteps, embeds, where)
        low = self._forward(second, latents, timesteps, embeds, where)
        return torch.where(noisy[:, None, :, None, None].to(high.device), high, low)

    def _forward(self, model: Any, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        _, patch_h, patch_w = model.config.patch_size
        tokens = (latents.shape[3] // patch_h) * (latents.shape[4] // patch_w)
        # one timestep for all: the stock scalar form, which embeds it once instead of once per token
        uniform = bool((timesteps == timesteps[:, :1]).all())
        times = timesteps[:, 0] if uniform else timesteps.repeat_interleave(tokens, 1)
        with where.context(model):
            answer = model(
                hidden_states=latents.to(model.dtype), timestep=times.to(latents.device), return_dict=False, **embeds
            )
        return answer[0].float()

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float, timesteps: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.guide; each expert has its own scale."""
        boundary = self._boundary
        if boundary is None or self.guidance_scale_2 is None:
            return uncond + scale * (cond - uncond)
        low = torch.full_like(timesteps, self.guidance_scale_2)
        scales = torch.where(timesteps >= boundary, torch.full_like(timesteps, scale), low)
        return uncond + scales[:, None, :, None, None].to(cond.device) * (cond - uncond)

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return CausalCacheDecoder(self.pipe.vae)

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipe.vae.config
        mean, std = (torch.tensor(v).to(like).reshape(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        mean, std = self._statistics(latents)
        # written as the stock pipeline computes it, so that rounding agrees
        return (latents / (1.0 / std) + mean).to(self.pipe.vae.dtype)

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        latents = self.pipe.vae.encode(frames.to(self.device, self.pipe.vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std


class WanImageFrames(WanFrames):
    """WanImageToVideoPipeline with the TI2V-5B checkpoint, whose given frame is a clean first latent with timestep 0."""

    family: ClassVar[str] = "Wan TI2V"
    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    route: ClassVar[str] = "per token, stock forward (a clean first frame trained so)"
    note: ClassVar[str] = "Wan 2.2 TI2V-5B; needs start. The same checkpoint in a WanPipeline makes text to video"
    continues: ClassVar[bool] = True

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        if not pipe.config.get("expand_timesteps"):
            return (
                "this Wan image-to-video model reads a clean first frame in extra channels, which no latent far from the start "
                "has; use TI2V-5B (expand_timesteps), or a text-to-video checkpoint with start=..."
            )
        return super().why_not(pipe)
