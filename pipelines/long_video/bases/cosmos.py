"""Cosmos 1.0 and 2.5, text to world: a timestep per frame, [B, 1, F, 1, 1], as the stock forward takes it.

The EDM scheduler of 1.0 (arXiv 2206.00364) works on x = x0 + sigma n. Scaled as the model sees it, y = x / sqrt(sigma^2 + d^2),
the same trajectory is variance-preserving with alpha = d / sqrt(sigma^2 + d^2) and the model answers v: so the queue holds y,
and an Euler step is a DDIM step. 2.5 is a rectified flow over Wan's latents that is told sigma itself.
"""

from dataclasses import replace
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
from genattn.pipelines.long_video.bases.wan import WanFrames
from genattn.pipelines.long_video.output.stream_decode import OverlapDecoder, StreamDecoder
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, SingleStepSolver
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid


class CosmosFrames(FrameDenoiser):
    """CosmosTextToWorldPipeline."""

    family: ClassVar[str] = "Cosmos"
    pipelines: ClassVar[tuple[str, ...]] = ("CosmosTextToWorldPipeline",)
    route: ClassVar[str] = "per frame, stock forward"
    decode: ClassVar[str] = "overlapping chunks, cross-faded"
    note: ClassVar[str] = "Cosmos 1.0; the safety checker of the pipeline is not run on streamed frames"

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        return why_not_one_latent_a_patch(pipe.transformer)

    @property
    def channels(self) -> int:
        """See FrameDenoiser.channels."""
        return int(self.pipe.transformer.config.in_channels)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_scale_factor_spatial
        unit = factor * self.pipe.transformer.config.patch_size[1]
        if height % unit or width % unit:
            raise GenAttnError(f"height and width must be multiples of {unit} for this model, got {height} x {width}")
        return height // factor, width // factor

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See FrameDenoiser.solver."""
        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ != "EDMEulerScheduler":
            raise GenAttnError(f"Cosmos in a queue needs its EDMEulerScheduler, got {type(scheduler).__name__}")
        copy = type(scheduler).from_config(scheduler.config)
        copy.set_timesteps(num_levels)
        data, sigmas = copy.config.sigma_data, copy.sigmas.double().flip(0)
        scale = (sigmas.square() + data**2).rsqrt()
        clean = copy.precondition_noise(torch.tensor([copy.config.sigma_min])).double()
        steps = torch.cat([clean, copy.timesteps.double().flip(0)])
        return SingleStepSolver(NoiseGrid(data * scale, sigmas * scale, steps, "v_prediction"), eta or 0.0)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        return encode_to_length(self, prompt, negative_prompt, guided)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model, factor = self.pipe.transformer, self.pipe.vae_scale_factor_spatial
        height, width = latents.shape[3] * factor, latents.shape[4] * factor
        times = timesteps.to(latents.device, model.dtype)
        uniform = bool((times == times[:, :1]).all())
        with where.context(model):
            answer = model(
                hidden_states=latents.to(model.dtype),
                timestep=times[:, 0] if uniform else times[:, None, :, None, None],
                fps=self.default("fps"),
                padding_mask=torch.zeros(1, 1, height, width, device=latents.device, dtype=model.dtype),
                return_dict=False,
                **embeds,
            )
        # this scheduler's "epsilon" adds what v-prediction subtracts
        sign = -1.0 if self.pipe.scheduler.config.prediction_type == "epsilon" else 1.0
        return sign * answer[0].float()

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float, timesteps: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.guide; Cosmos counts its scale from the conditional answer."""
        return cond + scale * (cond - uncond)

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return OverlapDecoder(self.pipe.vae, self.pipe.vae_scale_factor_temporal)

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        config = self.pipe.vae.config
        if config.latents_mean is None:
            return None
        parts = (
            torch.tensor(v).to(like).reshape(1, config.latent_channels, -1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        # the statistics are per latent frame of a clip; a stream has no last frame, so those of the second are kept
        mean, std = (v[:, :, min(1, v.shape[2] - 1)][:, :, None] for v in parts)
        return mean, std

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        statistics = self._statistics(latents)
        return latents if statistics is None else latents * statistics[1] + statistics[0]

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        encoded = self.pipe.vae.encode(frames.to(self.device, self.pipe.vae.dtype))
        latents = encoded.latent_dist.mode().float()
        statistics = self._statistics(latents)
        return latents if statistics is None else (latents - statistics[0]) / statistics[1]


class Cosmos25Frames(WanFrames):
    """Cosmos2_5_PredictBasePipeline without a given picture. Latents that left stand in a window as the condition frames that
    the model was trained to continue: their mask is 1 and their timestep the pipeline's own for such frames."""

    family: ClassVar[str] = "Cosmos 2.5"
    pipelines: ClassVar[tuple[str, ...]] = ("Cosmos2_5_PredictBasePipeline",)
    route: ClassVar[str] = "per frame, stock forward (clean frames trained so)"
    note: ClassVar[str] = "references in the head are its condition frames; the safety checker is not run on streamed frames"

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        return CosmosFrames.why_not(pipe)

    @property
    def channels(self) -> int:
        """See FrameDenoiser.channels; one channel of the model's input is the mask of condition frames."""
        return int(self.pipe.transformer.config.in_channels) - 1

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """See FrameDenoiser.solver."""
        solver = super().solver(num_levels, latents, eta)
        told = solver.grid.sigma.clone()
        told[0] = self.default("conditional_frame_timestep")
        solver.grid = replace(solver.grid, timesteps=told)
        return solver

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model, factor = self.pipe.transformer, self.pipe.vae_scale_factor_spatial
        height, width = latents.shape[3] * factor, latents.shape[4] * factor
        times = timesteps.to(latents.device)[:, None, :, None, None]
        is_clean = times <= self.default("conditional_frame_timestep")
        with where.context(model):
            answer = model(
                hidden_states=latents.to(model.dtype),
                condition_mask=is_clean.to(model.dtype).expand(-1, -1, -1, *latents.shape[3:]),
                timestep=times,
                padding_mask=torch.zeros(1, 1, height, width, device=latents.device, dtype=model.dtype),
                return_dict=False,
                **embeds,
            )
        return answer[0].float()

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float, timesteps: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.guide; Cosmos counts its scale from the conditional answer."""
        return cond + scale * (cond - uncond)
