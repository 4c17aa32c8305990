"""Kandinsky 5 text to video: its modulation layers answer one vector per frame, and the last layer's norm takes over its own.

Kandinsky's latents keep their channels last, its prompts have their own length each, and its long models lay tokens out in
squares of 8 x 8 within a frame, so that those of a frame stay together.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Prompt, why_not_one_latent_a_patch
from genattn.pipelines.long_video.bases.per_frame_modulation import Forward, FrameEmbedding, ModulatedFrames, Spread


class KandinskyFrames(ModulatedFrames):
    """Kandinsky5T2VPipeline."""

    family: ClassVar[str] = "Kandinsky 5"
    pipelines: ClassVar[tuple[str, ...]] = ("Kandinsky5T2VPipeline",)
    decode: ClassVar[str] = "overlapping chunks, cross-faded"
    note: ClassVar[str] = "prompts of different lengths fade by prompt_blend='prediction'"
    has_cross_attention: ClassVar[bool] = True

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        return why_not_one_latent_a_patch(pipe.transformer)

    @property
    def channels(self) -> int:
        """See FrameDenoiser.channels."""
        return int(self.pipe.transformer.config.in_visual_dim)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_scale_factor_spatial
        unit = factor * self.pipe.transformer.config.patch_size[1]
        unit *= 8 if self.pipe.transformer.config.attention_type == "nabla" else 1
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        return Prompt(self._encoded(prompt), self._encoded(negative_prompt or "") if guided else None)

    def _encoded(self, prompt: str) -> Embeds:
        length = self.default("max_sequence_length")
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, max_sequence_length=length, device=self.device, dtype=self.dtype)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def replaced(self) -> Sequence[tuple[Any, Forward]]:
        """See ModulatedFrames.replaced."""
        model = self.pipe.transformer
        return [
            *((block.visual_modulation, _modulation) for block in model.visual_transformer_blocks),
            (model.out_layer.modulation, _no_modulation),
            (model.out_layer.norm, self._last_norm),
        ]

    def _last_norm(self, own: FrameEmbedding, module: Any, stock: Forward, hidden: torch.Tensor) -> torch.Tensor:
        shift, scale = _vectors(self.pipe.transformer.out_layer.modulation, own).float()[:, :, None, None].chunk(2, -1)
        return stock(hidden) * (scale + 1.0) + shift

    def told_time(self, times: torch.Tensor) -> torch.Tensor:
        """See ModulatedFrames.told_time."""
        return times.to(self.dtype)

    def embedding(self, times: torch.Tensor, embeds: Embeds) -> torch.Tensor:
        """See ModulatedFrames.embedding."""
        model = self.pipe.transformer
        text = model.pooled_text_embeddings(embeds["pooled_projections"])
        return model.time_embeddings(self.told_time(times.reshape(-1))).reshape(*times.shape, -1) + text[:, None]

    def tokens(self, latents: torch.Tensor) -> int:
        """See ModulatedFrames.tokens."""
        _, patch_h, patch_w = self.pipe.transformer.config.patch_size
        return (latents.shape[3] // patch_h) * (latents.shape[4] // patch_w)

    def from_model(self, answer: torch.Tensor) -> torch.Tensor:
        """See ModulatedFrames.from_model."""
        return answer.permute(0, 4, 1, 2, 3)

    def arguments(self, latents: torch.Tensor, embeds: Embeds) -> dict[str, Any]:
        """See ModulatedFrames.arguments."""
        pipe, model = self.pipe, self.pipe.transformer
        _, _, frames, height, width = latents.shape
        _, patch_h, patch_w = model.config.patch_size
        hidden = latents.permute(0, 2, 3, 4, 1)
        if model.visual_cond:
            # the channels of a given picture and its mask, zero in text to video
            hidden = torch.cat([hidden, torch.zeros_like(hidden), torch.zeros_like(hidden[..., :1])], -1)
        factor, words = pipe.vae_scale_factor_spatial, embeds["encoder_hidden_states"].shape[1]
        places = (frames, height // patch_h, width // patch_w)
        return {
            "hidden_states": hidden.to(self.dtype),
            **embeds,
            "visual_rope_pos": [torch.arange(n, device=latents.device) for n in places],
            "text_rope_pos": torch.arange(words, device=latents.device),
            "scale_factor": pipe._get_scale_factor(height * factor, width * factor),
            "sparse_params": pipe.get_sparse_params(hidden, latents.device),
        }


def _vectors(module: Any, own: FrameEmbedding) -> torch.Tensor:
    return module.out_layer(module.activation(own.frames))


def _modulation(own: FrameEmbedding, module: Any, stock: Forward, embedding: torch.Tensor) -> Spread:
    return own.later(_vectors(module, own))


def _no_modulation(own: FrameEmbedding, module: Any, stock: Forward, embedding: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(stock(embedding))
