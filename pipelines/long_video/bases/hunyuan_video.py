"""HunyuanVideo and HunyuanVideo-1.5, text to video: a modulation per frame through the norms of their blocks.

HunyuanVideo is told its guidance scale and makes one pass; 1.5 runs classifier-free guidance by the pipeline's guider and reads
a clean picture in extra channels, which text to video leaves at zero.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Prompt
from genattn.pipelines.long_video.bases.per_frame_modulation import (
    Forward,
    ModulatedFrames,
    norm_continuous,
    norm_zero,
    norm_zero_single,
)
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, solver_from_scheduler


class HunyuanVideoFrames(ModulatedFrames):
    """HunyuanVideoPipeline; its guidance scale is told to the model."""

    family: ClassVar[str] = "HunyuanVideo"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    decode: ClassVar[str] = "overlapping chunks, cross-faded"
    note: ClassVar[str] = "guidance is distilled, one pass; text stands in the same attention"
    tells_guidance: ClassVar[bool] = True

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        config = pipe.transformer.config
        if config.patch_size_t != 1:
            return f"a queue needs one latent per patch in time, got patch_size_t={config.patch_size_t}"
        if getattr(config, "image_condition_type", None) is not None:
            return "this HunyuanVideo transformer takes its first frame from a given picture; use a text-to-video checkpoint"
        return None

    @property
    def channels(self) -> int:
        """See FrameDenoiser.channels."""
        return int(self.pipe.vae.config.latent_channels)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_scale_factor_spatial
        unit = factor * self.pipe.transformer.config.patch_size
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See FrameDenoiser.solver; with the pipeline's own sigmas."""
        sigmas = np.linspace(1.0, 0.0, num_levels + 1)[:-1]
        return solver_from_scheduler(self.pipe.scheduler, num_levels, eta=eta, sigmas=sigmas)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        template = self.default("prompt_template")
        embeds, pooled, mask = self.pipe.encode_prompt(prompt, prompt_template=template, device=self.device, dtype=self.dtype)
        # the mask stays a mask: cross-fades take what either prompt uses
        return Prompt(
            {
                "encoder_hidden_states": embeds.to(self.dtype),
                "pooled_projections": pooled.to(self.dtype),
                "encoder_attention_mask": mask.bool(),
            }
        )

    def replaced(self) -> Sequence[tuple[Any, Forward]]:
        """See ModulatedFrames.replaced."""
        model = self.pipe.transformer
        return [
            *((block.norm1, norm_zero) for block in model.transformer_blocks),
            *((block.norm, norm_zero_single) for block in model.single_transformer_blocks),
            (model.norm_out, norm_continuous),
        ]

    def _guidance(self, rows: int) -> torch.Tensor | None:
        if not self.pipe.transformer.config.guidance_embeds:
            return None
        scale = self.guidance_scale if self.guidance_scale is not None else self.default("guidance_scale")
        return torch.full((rows,), float(scale), dtype=self.dtype, device=self.device) * 1000.0

    def embedding(self, times: torch.Tensor, embeds: Embeds) -> torch.Tensor:
        """See ModulatedFrames.embedding."""
        batch, frames = times.shape
        pooled = embeds["pooled_projections"].repeat_interleave(frames, 0)
        own = self.pipe.transformer.time_text_embed(times.reshape(-1), pooled, self._guidance(batch * frames))[0]
        return own.reshape(batch, frames, -1)

    def arguments(self, latents: torch.Tensor, embeds: Embeds) -> dict[str, Any]:
        """See ModulatedFrames.arguments."""
        mask = embeds["encoder_attention_mask"].to(self.dtype)
        told = {"guidance": self._guidance(latents.shape[0])}
        return {"hidden_states": latents.to(self.dtype), **embeds, "encoder_attention_mask": mask, **told}

    def tokens(self, latents: torch.Tensor) -> int:
        """See ModulatedFrames.tokens."""
        patch = self.pipe.transformer.config.patch_size
        return (latents.shape[3] // patch) * (latents.shape[4] // patch)


class HunyuanVideo15Frames(HunyuanVideoFrames):
    """HunyuanVideo15Pipeline, guided by its ClassifierFreeGuidance."""

    family: ClassVar[str] = "HunyuanVideo-1.5"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Pipeline",)
    note: ClassVar[str] = "guidance as its guider says; text stands in the same attention"
    tells_guidance: ClassVar[bool] = False

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        return super().why_not(pipe) or why_not_plain_guidance(pipe.guider)

    def default(self, name: str) -> Any:
        """See FrameDenoiser.default; guidance belongs to the guider."""
        if name != "guidance_scale":
            return super().default(name)
        return self.pipe.guider.guidance_scale if self.pipe.guider._enabled else 1.0

    def default_size(self) -> tuple[int | None, int | None]:
        """See FrameDenoiser.default_size."""
        told, pipe = self.shipped(), self.pipe
        wide, high = pipe.default_aspect_ratio
        height, width = pipe.video_processor.calculate_default_height_width(high, wide, pipe.target_size)
        return told.get("height", height), told.get("width", width)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        cond = self._encoded(prompt)
        return Prompt(cond, self._encoded(negative_prompt or "") if guided else None)

    def _encoded(self, prompt: str) -> Embeds:
        embeds, mask, glyphs, glyph_mask = self.pipe.encode_prompt(prompt, device=self.device, dtype=self.dtype)
        texts = {"encoder_hidden_states": embeds, "encoder_hidden_states_2": glyphs}
        return {**texts, "encoder_attention_mask": mask.bool(), "encoder_attention_mask_2": glyph_mask.bool()}

    def replaced(self) -> Sequence[tuple[Any, Forward]]:
        """See ModulatedFrames.replaced."""
        model = self.pipe.transformer
        return [*((block.norm1, norm_zero) for block in model.transformer_blocks), (model.norm_out, norm_continuous)]

    def told_time(self, times: torch.Tensor) -> torch.Tensor:
        """See ModulatedFrames.told_time."""
        return times.to(self.dtype)

    def embedding(self, times: torch.Tensor, embeds: Embeds) -> torch.Tensor:
        """See ModulatedFrames.embedding."""
        return self.pipe.transformer.time_embed(self.told_time(times.reshape(-1))).reshape(*times.shape, -1)

    def arguments(self, latents: torch.Tensor, embeds: Embeds) -> dict[str, Any]:
        """See ModulatedFrames.arguments."""
        pipe, batch = self.pipe, latents.shape[0]
        nothing = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
        image = latents.new_zeros(batch, pipe.vision_num_semantic_tokens, pipe.vision_states_dim, dtype=self.dtype)
        masks = {name: embeds[name].to(self.dtype) for name in ("encoder_attention_mask", "encoder_attention_mask_2")}
        hidden = torch.cat([latents, *nothing], 1).to(self.dtype)
        return {"hidden_states": hidden, "image_embeds": image, **embeds, **masks}


def why_not_plain_guidance(guider: Any) -> str | None:
    """Why a pipeline's guider is none that a queue can follow, or None."""
    name = type(guider).__name__
    if name != "ClassifierFreeGuidance":
        return f"a queue follows ClassifierFreeGuidance, got the guider {name}; set pipe.guider"
    if guider.guidance_rescale or guider.use_original_formulation or (guider._start, guider._stop) != (0.0, 1.0):
        return "a queue guides every level alike; leave the guider's rescale, formulation, start and stop at their defaults"
    return None
