"""LTX-Video: a timestep per token, as the stock forward takes it; the VAE has no cache and is decoded in overlapping chunks."""

from typing import Any, ClassVar

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass, Prompt
from genattn.pipelines.long_video.output.stream_decode import OverlapDecoder, StreamDecoder
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, solver_from_scheduler


class LTXFrames(FrameDenoiser):
    """LTXPipeline, text to video."""

    family: ClassVar[str] = "LTX-Video"
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    route: ClassVar[str] = "per token, stock forward"
    decode: ClassVar[str] = "overlapping chunks, cross-faded"
    note: ClassVar[str] = "trained with clean tokens beside noisy ones"

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        if pipe.transformer_temporal_patch_size != 1:
            return f"a queue needs one latent per patch in time, got patch_size_t={pipe.transformer_temporal_patch_size}"
        return None

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_spatial_compression_ratio
        unit = factor * self.pipe.transformer_spatial_patch_size
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See FrameDenoiser.solver; the schedule is shifted by the length of a window, as the pipeline shifts it by the
        clip's."""
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        config = self.pipe.scheduler.config
        ends = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        frames, height, width = latents
        shift = calculate_shift(frames * height * width, *(config.get(name, default) for name, default in ends))
        sigmas = np.linspace(1.0, 1 / num_levels, num_levels)
        return solver_from_scheduler(self.pipe.scheduler, num_levels, eta=eta, sigmas=sigmas, mu=shift)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        length = min(self.default("max_sequence_length") or 128, self.pipe.tokenizer.model_max_length)
        cond, mask, uncond, uncond_mask = self.pipe.encode_prompt(
            prompt, negative_prompt, guided, max_sequence_length=length, device=self.device, dtype=self.dtype
        )
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return Prompt(dict(zip(names, (cond, mask))), dict(zip(names, (uncond, uncond_mask))) if guided else None)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        pipe, model = self.pipe, self.pipe.transformer
        patch = pipe.transformer_spatial_patch_size
        _, _, frames, height, width = latents.shape
        rate = self.default("frame_rate") or 25
        space = pipe.vae_spatial_compression_ratio
        with where.context(model):
            answer = model(
                hidden_states=pipe._pack_latents(latents, patch, 1).to(model.dtype),
                timestep=timesteps.to(latents.device).repeat_interleave((height // patch) * (width // patch), 1),
                num_frames=frames,
                height=height // patch,
                width=width // patch,
                rope_interpolation_scale=(pipe.vae_temporal_compression_ratio / rate, space, space),
                return_dict=False,
                **embeds,
            )
        return pipe._unpack_latents(answer[0].float(), frames, height, width, patch, 1)

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        vae = self.pipe.vae
        extra: dict[str, Any] = (
            {"temb": torch.zeros(1, device=self.device, dtype=vae.dtype)} if vae.config.timestep_conditioning else {}
        )
        return OverlapDecoder(vae, self.pipe.vae_temporal_compression_ratio, **extra)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        vae = self.pipe.vae
        return self.pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        vae = self.pipe.vae
        latents = vae.encode(frames.to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (v.to(latents).reshape(1, -1, 1, 1, 1) for v in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * vae.config.scaling_factor / std


class LTXImageFrames(LTXFrames):
    """LTXImageToVideoPipeline: the given frame is a clean first latent with timestep 0."""

    family: ClassVar[str] = "LTX-Video image to video"
    pipelines: ClassVar[tuple[str, ...]] = ("LTXImageToVideoPipeline",)
    route: ClassVar[str] = "per token, stock forward (clean frames trained so)"
    note: ClassVar[str] = "needs start"
    continues: ClassVar[bool] = True
