"""CogVideoX: one modulation vector per block by design, one per frame by replacing the forward of two kinds of norm on the
instance.

Video tokens are modulated by the embedding of their own frame's timestep, text tokens by that of the window's mean timestep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass, Prompt
from genattn.pipelines.long_video.bases.per_frame_modulation import forwards_replaced
from genattn.pipelines.long_video.output.stream_decode import ReturnedCacheDecoder, StreamDecoder


class CogVideoXFrames(FrameDenoiser):
    """CogVideoXPipeline (1.0 checkpoints: 2B and 5B)."""

    family: ClassVar[str] = "CogVideoX"
    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    route: ClassVar[str] = "norms patched on the instance"
    decode: ClassVar[str] = "cached, chunks of 3, 2, 2, ..., exact"
    note: ClassVar[str] = "set CogVideoXDDIMScheduler; text stands in the same attention"
    has_cross_attention: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._frames: torch.Tensor | None = None
        self._text: torch.Tensor | None = None

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        config = pipe.transformer.config
        if config.patch_size_t is not None:
            return f"CogVideoX 1.5 puts {config.patch_size_t} latents into one patch, which cannot have two timesteps"
        if config.ofs_embed_dim is not None or config.in_channels != pipe.vae.config.latent_channels:
            return "this CogVideoX transformer reads a given picture in extra channels; use a text-to-video checkpoint"
        return None

    def limits(self, window: int) -> str | None:
        """See FrameDenoiser.limits."""
        config = self.pipe.transformer.config
        if not config.use_learned_positional_embeddings:
            return None
        own = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return None if window == own else f"window must be {own}, the length of the learned positions, got {window}"

    def default_size(self) -> tuple[int | None, int | None]:
        """See FrameDenoiser.default_size."""
        config, factor = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        return config.sample_height * factor, config.sample_width * factor

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_scale_factor_spatial
        unit = factor * self.pipe.transformer.config.patch_size
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        length = self.pipe.transformer.config.max_text_seq_length
        cond, uncond = self.pipe.encode_prompt(
            prompt, negative_prompt, guided, max_sequence_length=length, device=self.device, dtype=self.dtype
        )
        return Prompt({"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond} if guided else None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See FrameDenoiser.installed."""
        model = self.pipe.transformer
        zeros = [m for m in model.modules() if isinstance(m, CogVideoXLayerNormZero)]
        with forwards_replaced([*((module, self._norm_zero) for module in zeros), (model.norm_out, self._norm_out)]):
            yield

    def _norm_zero(
        self, module: Any, stock: Any, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if self._frames is None or self._text is None:
            return stock(hidden, text, temb)
        tokens = hidden.shape[1] // self._frames.shape[1]
        shift, scale, gate = (
            _modulation(module, self._frames)[..., : 3 * hidden.shape[2]].repeat_interleave(tokens, 1).chunk(3, -1)
        )
        text_shift, text_scale, text_gate = _modulation(module, self._text)[..., 3 * hidden.shape[2] :].chunk(3, -1)
        video = module.norm(hidden) * (1 + scale) + shift
        words = module.norm(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        return video, words, gate, text_gate[:, None]

    def _norm_out(self, module: Any, stock: Any, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if self._frames is None:
            return stock(hidden, temb=temb)
        tokens = hidden.shape[1] // self._frames.shape[1]
        shift, scale = _modulation(module, self._frames).repeat_interleave(tokens, 1).chunk(2, -1)
        return module.norm(hidden) * (1 + scale) + shift

    def _embedding(self, times: torch.Tensor) -> torch.Tensor:
        model = self.pipe.transformer
        return model.time_embedding(model.time_proj(times).to(model.dtype), None)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model, pipe = self.pipe.transformer, self.pipe
        times = timesteps.to(latents.device)
        batch, _, frames, height, width = latents.shape
        if not bool((times == times[:, :1]).all()):
            self._frames = self._embedding(times.reshape(-1)).reshape(batch, frames, -1)
            self._text = self._embedding(times.mean(1))
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            factor = pipe.vae_scale_factor_spatial
            rotary = pipe._prepare_rotary_positional_embeddings(height * factor, width * factor, frames, latents.device)
        try:
            with where.context(model):
                answer = model(
                    hidden_states=latents.transpose(1, 2).to(model.dtype),
                    timestep=times[:, 0],
                    image_rotary_emb=rotary,
                    return_dict=False,
                    **embeds,
                )
        finally:
            self._frames = self._text = None
        return answer[0].float().transpose(1, 2)

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return ReturnedCacheDecoder(self.pipe.vae)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        return 1 / self.pipe.vae_scaling_factor_image * latents

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        latents = self.pipe.vae.encode(frames.to(self.device, self.pipe.vae.dtype)).latent_dist.mode().float()
        return latents * self.pipe.vae_scaling_factor_image


def _modulation(module: Any, embedding: torch.Tensor) -> torch.Tensor:
    return module.linear(module.silu(embedding))
