"""LTX-2: the picture stream alone, a timestep per token as the stock forward takes it.

The model makes sound along with the picture and lets either look at the other. It can be told to keep them apart
(`isolate_modalities`, made for its own guidance between them); then the picture does not depend on the sound at all, and one
silent latent stands where the sound track would.
"""

from typing import Any, ClassVar

import numpy as np
import torch

from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Pass, Prompt
from genattn.pipelines.long_video.bases.ltx import LTXFrames
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, solver_from_scheduler

CLIP_FRAMES = 121  # what the pipeline makes when nobody says and no duration head guesses


class LTX2Frames(LTXFrames):
    """LTX2Pipeline, silent."""

    family: ClassVar[str] = "LTX-2"
    pipelines: ClassVar[tuple[str, ...]] = ("LTX2Pipeline",)
    route: ClassVar[str] = "per token, stock forward, picture stream alone"
    note: ClassVar[str] = "no sound; classifier-free guidance alone, without rescale, STG or guidance between picture and sound"

    def default(self, name: str) -> Any:
        """See FrameDenoiser.default."""
        found = super().default(name)
        return CLIP_FRAMES if name == "num_frames" and found is None else found

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See LTXFrames.solver; LTX-2 has other ends of the shift."""
        from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift

        config = self.pipe.scheduler.config
        ends = (("base_image_seq_len", 1024), ("max_image_seq_len", 4096), ("base_shift", 0.95), ("max_shift", 2.05))
        frames, height, width = latents
        places = frames * height * width // self.pipe.transformer_spatial_patch_size**2
        shift = calculate_shift(places, *(config.get(name, default) for name, default in ends))
        sigmas = np.linspace(1.0, 1 / num_levels, num_levels)
        return solver_from_scheduler(self.pipe.scheduler, num_levels, eta=eta, sigmas=sigmas, mu=shift)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        pipe = self.pipe
        length = min(self.default("max_sequence_length") or 1024, pipe.tokenizer.model_max_length)
        cond, mask, uncond, uncond_mask = pipe.encode_prompt(
            prompt, negative_prompt, guided, max_sequence_length=length, device=self.device
        )
        return Prompt(self._connected(cond, mask), self._connected(uncond, uncond_mask) if guided else None)

    def _connected(self, embeds: torch.Tensor, mask: torch.Tensor) -> Embeds:
        picture, sound, seen = self.pipe.connectors(embeds, mask, padding_side=self.pipe.tokenizer.padding_side)
        texts = {"encoder_hidden_states": picture, "audio_encoder_hidden_states": sound}
        return {**texts, "encoder_attention_mask": seen, "audio_encoder_attention_mask": seen}

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        pipe, model = self.pipe, self.pipe.transformer
        patch, times = pipe.transformer_spatial_patch_size, timesteps.to(latents.device)
        batch, _, frames, height, width = latents.shape
        whole = times.mean(1)
        with where.context(model):
            answer = model(
                hidden_states=pipe._pack_latents(latents, patch, 1).to(model.dtype),
                audio_hidden_states=latents.new_zeros(batch, 1, model.config.audio_in_channels, dtype=model.dtype),
                timestep=times.repeat_interleave((height // patch) * (width // patch), 1),
                audio_timestep=whole,
                sigma=whole,
                num_frames=frames,
                height=height // patch,
                width=width // patch,
                fps=self.default("frame_rate"),
                audio_num_frames=1,
                isolate_modalities=True,
                use_cross_timestep=self.default("use_cross_timestep"),
                return_dict=False,
                **embeds,
            )
        return pipe._unpack_latents(answer[0].float(), frames, height // patch, width // patch, patch, 1)
