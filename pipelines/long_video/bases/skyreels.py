"""SkyReels-V2 diffusion forcing: the one family trained with a timestep per frame, so a queue is nothing new to it."""

from typing import Any, ClassVar

import torch

from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Pass, why_not_one_latent_a_patch
from genattn.pipelines.long_video.bases.wan import WanFrames


class SkyReelsFrames(WanFrames):
    """SkyReelsV2DiffusionForcingPipeline."""

    family: ClassVar[str] = "SkyReels-V2"
    pipelines: ClassVar[tuple[str, ...]] = ("SkyReelsV2DiffusionForcingPipeline",)
    route: ClassVar[str] = "per frame, stock forward (trained so)"
    decode: ClassVar[str] = "cached, exact"
    note: ClassVar[str] = "diffusion-forcing checkpoints only"

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        return why_not_one_latent_a_patch(pipe.transformer)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model = self.pipe.transformer
        if model.config.inject_sample_info and latents.shape[0] > 1:
            # the stock forward repeats the frame-rate embedding along the wrong axis for more than one sample
            parts = [
                self.predict(latents[i : i + 1], timesteps[i : i + 1], {k: v[i : i + 1] for k, v in embeds.items()}, where)
                for i in range(latents.shape[0])
            ]
            return torch.cat(parts)
        # the model's own code for its frame rates: 0 is 16, 1 is 24 frames a second
        fps = {"fps": [1] * latents.shape[0]} if model.config.inject_sample_info else {}
        with where.context(model):
            answer = model(
                hidden_states=latents.to(model.dtype),
                timestep=timesteps.to(latents.device),
                enable_diffusion_forcing=True,
                return_dict=False,
                **embeds,
                **fps,
            )
        return answer[0].float()
