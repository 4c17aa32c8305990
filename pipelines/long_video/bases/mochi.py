"""Mochi: a modulation per frame through the norms of its blocks; its sigmas rise to the picture."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Prompt
from genattn.pipelines.long_video.bases.per_frame_modulation import (
    Forward,
    FrameEmbedding,
    ModulatedFrames,
    modulation,
    norm_continuous,
)
from genattn.pipelines.long_video.output.stream_decode import OverlapDecoder, StreamDecoder
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, SingleStepSolver
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid, fresh_scheduler


class MochiFrames(ModulatedFrames):
    """MochiPipeline."""

    family: ClassVar[str] = "Mochi"
    pipelines: ClassVar[tuple[str, ...]] = ("MochiPipeline",)
    decode: ClassVar[str] = "overlapping chunks, cross-faded"
    note: ClassVar[str] = "text stands in the same attention"

    def default_size(self) -> tuple[int | None, int | None]:
        """See FrameDenoiser.default_size."""
        told = self.shipped()
        return told.get("height", self.pipe.default_height), told.get("width", self.pipe.default_width)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_spatial_scale_factor
        unit = factor * self.pipe.transformer.config.patch_size
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See FrameDenoiser.solver. The stock scheduler counts sigma from noise to picture; a queue counts it back."""
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        scheduler = self.pipe.scheduler
        if not scheduler.config.get("invert_sigmas"):
            raise GenAttnError("Mochi in a queue needs its own flow-match scheduler with invert_sigmas=True, got one without")
        if num_levels < 2:
            raise GenAttnError(f"Mochi's schedule has at least 2 levels, got {num_levels}")
        copy = fresh_scheduler(scheduler, num_levels, sigmas=np.array(linear_quadratic_schedule(num_levels, 0.025)))
        sigma = 1.0 - copy.sigmas.double().flip(0)
        clean = torch.full((1,), float(scheduler.config.num_train_timesteps), dtype=torch.float64)
        told = torch.cat([clean, copy.timesteps.double().cpu().flip(0)])
        return SingleStepSolver(NoiseGrid(1.0 - sigma, sigma, told, "flow_prediction"), eta or 0.0)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        length = min(self.default("max_sequence_length"), self.pipe.tokenizer_max_length)
        cond, mask, uncond, uncond_mask = self.pipe.encode_prompt(
            prompt, negative_prompt, guided, max_sequence_length=length, device=self.device, dtype=self.dtype
        )
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return Prompt(dict(zip(names, (cond, mask))), dict(zip(names, (uncond, uncond_mask))) if guided else None)

    def replaced(self) -> Sequence[tuple[Any, Forward]]:
        """See ModulatedFrames.replaced."""
        model = self.pipe.transformer
        return [*((block.norm1, _rms_norm_zero) for block in model.transformer_blocks), (model.norm_out, norm_continuous)]

    def told_time(self, times: torch.Tensor) -> torch.Tensor:
        """See ModulatedFrames.told_time."""
        return times.to(self.dtype)

    def embedding(self, times: torch.Tensor, embeds: Embeds) -> torch.Tensor:
        """See ModulatedFrames.embedding."""
        part = self.pipe.transformer.time_embed
        own = part.timestep_embedder(part.time_proj(self.told_time(times.reshape(-1))).to(self.dtype))
        text = part.pooler(embeds["encoder_hidden_states"], embeds["encoder_attention_mask"])
        return own.reshape(*times.shape, -1) + text[:, None]

    def arguments(self, latents: torch.Tensor, embeds: Embeds) -> dict[str, Any]:
        """See ModulatedFrames.arguments."""
        return {"hidden_states": latents.to(self.dtype), **embeds}

    def tokens(self, latents: torch.Tensor) -> int:
        """See ModulatedFrames.tokens."""
        patch = self.pipe.transformer.config.patch_size
        return (latents.shape[3] // patch) * (latents.shape[4] // patch)

    def from_model(self, answer: torch.Tensor) -> torch.Tensor:
        """See ModulatedFrames.from_model; the model's velocity points to the picture."""
        return -answer

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return OverlapDecoder(self.pipe.vae, int(self.pipe.vae.temporal_compression_ratio))

    def _statistics(self, like: torch.Tensor) -> tuple[Any, Any]:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return 0.0, 1.0
        mean, std = (torch.tensor(v).to(like).reshape(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        mean, std = self._statistics(latents)
        return latents * std / self.pipe.vae.config.scaling_factor + mean

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        latents = self.pipe.vae.encode(frames.to(self.device, self.pipe.vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std


def _rms_norm_zero(
    own: FrameEmbedding, module: Any, stock: Forward, hidden: torch.Tensor, emb: torch.Tensor
) -> tuple[Any, ...]:
    scale, *rest = modulation(module, own.frames).chunk(4, -1)
    normed = module.norm(hidden.float()) * (1 + own.spread(scale).float())
    return normed.to(hidden.dtype), *(own.later(part) for part in rest)
