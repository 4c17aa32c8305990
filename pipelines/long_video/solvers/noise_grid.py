"""The noise levels of a stock scheduler as tables, one row per queue level: x_level = alpha x0 + sigma noise.

Level 0 is the cleanest step of the sampler, num_levels - 1 the noisiest, -1 the finished latent. Variance-preserving schedulers
(alpha^2 + sigma^2 = 1) and rectified flow (alpha = 1 - sigma) differ only in the numbers, so all solvers read the same tables.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from genattn.errors import GenAttnError

FLOW_PREDICTIONS = ("flow_prediction",)
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class NoiseGrid:
    """Tables of num_levels + 1 rows, float64; row r belongs to level r - 1, so row 0 is the finished latent.

    alpha, sigma: signal and noise. timesteps: what the model is told, 0 for the finished latent. prediction: what it answers.
    clip: bound on the predicted clean latent, or None.
    """

    alpha: torch.Tensor
    sigma: torch.Tensor
    timesteps: torch.Tensor
    prediction: str
    clip: float | None = None

    @property
    def num_levels(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps) - 1

    @property
    def is_flow(self) -> bool:
        """Rectified flow rather than variance-preserving."""
        return self.prediction in FLOW_PREDICTIONS

    def at(self, table: torch.Tensor, levels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows of a table for levels [F] as [1, 1, F, 1, 1], or for levels [B, F] as [B, 1, F, 1, 1], on `like`'s device."""
        rows = table[levels.cpu() + 1].to(device=like.device, dtype=_at_least_float(like.dtype))
        return rows.reshape(1 if levels.ndim == 1 else levels.shape[0], 1, -1, 1, 1)

    def model_timesteps(self, levels: torch.Tensor) -> torch.Tensor:
        """What the model is told for each level, float32, same shape as `levels`."""
        return self.timesteps[levels.cpu() + 1].float()

    def clean(self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The clean latent that the model means, [B, C, F, H, W]."""
        alpha, sigma = self.at(self.alpha, levels, sample), self.at(self.sigma, levels, sample)
        if self.prediction == "epsilon":
            out = (sample - sigma * prediction) / alpha
        elif self.prediction == "v_prediction":
            out = alpha * sample - sigma * prediction
        elif self.prediction == "sample":
            out = prediction
        else:
            out = sample - sigma * prediction
        return out if self.clip is None else out.clamp(-self.clip, self.clip)

    def noise(self, sample: torch.Tensor, prediction: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The noise that the model means, [B, C, F, H, W]; from the unclipped answer, as the stock DDIM does."""
        alpha, sigma = self.at(self.alpha, levels, sample), self.at(self.sigma, levels, sample)
        if self.prediction == "epsilon":
            return prediction
        if self.prediction == "v_prediction":
            return alpha * prediction + sigma * sample
        if self.prediction == "sample":
            return (sample - alpha * prediction) / sigma
        return sample + alpha * prediction

    def prediction_from_clean(self, sample: torch.Tensor, clean: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What the model would have answered had it meant `clean`; the inverse of `clean` where nothing is clipped."""
        alpha, sigma = self.at(self.alpha, levels, sample), self.at(self.sigma, levels, sample)
        if self.prediction == "sample":
            return clean
        if self.prediction == "v_prediction":
            return (alpha * sample - clean) / sigma
        return (sample - alpha * clean) / sigma if self.prediction == "epsilon" else (sample - clean) / sigma

    def add_noise(self, clean: torch.Tensor, levels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A clean latent brought to its level; level -1 keeps it as it is."""
        noisy = self.at(self.alpha, levels, clean) * clean + self.at(self.sigma, levels, clean) * noise
        # the finished level may carry a trace of noise in a scheduler's tables; a reference latent is to stay what it was
        done = (levels < 0).to(clean.device).reshape(1, 1, -1, 1, 1)
        return torch.where(done, clean, noisy.to(clean.dtype))

    def renoise(self, sample: torch.Tensor, source: torch.Tensor, target: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A latent at level `source` taken up to the noisier level `target` in one jump, keeping its share of signal."""
        a0, s0 = self.at(self.alpha, source, sample), self.at(self.sigma, source, sample)
        a1, s1 = self.at(self.alpha, target, sample), self.at(self.sigma, target, sample)
        ratio = a1 / a0.clamp(min=1e-8)
        return (ratio * sample + (s1.square() - (ratio * s0).square()).clamp(min=0).sqrt() * noise).to(sample.dtype)


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fresh_scheduler(scheduler: Any, num_levels: int | None, **schedule: Any) -> Any:
    """A copy of a stock scheduler with its timesteps set; the pipeline's own is left alone.

    schedule: `sigmas`, `timesteps` or `mu`, passed on to `set_timesteps` where it takes them.
    """
    copy = type(scheduler).from_config(scheduler.config)
    accepted = inspect.signature(copy.set_timesteps).parameters
    unknown = [name for name in schedule if name not in accepted]
    if unknown:
        name = type(scheduler).__name__
        raise GenAttnError(f"{name}.set_timesteps takes {', '.join(accepted)}; got {', '.join(unknown)}, leave it out")
    custom = "timesteps" in schedule
    if num_levels is None and not custom and "sigmas" not in schedule:
        raise GenAttnError("num_levels must be given, or a custom schedule in `timesteps` or `sigmas`; got None")
    copy.set_timesteps(**({} if custom else {"num_inference_steps": num_levels}), **schedule)
    spread = float(getattr(copy, "init_noise_sigma", 1.0))
    if abs(spread - 1) > 1e-6:
        raise GenAttnError(
            f"a queue needs a scheduler whose noisiest latents have unit variance, {type(scheduler).__name__} starts at "
            f"{spread:.3g}; use DDIM, DPM-Solver++, UniPC, LCM or flow-match Euler"
        )
    return copy


def grid_from_alphas(copy: Any, timesteps: torch.Tensor, final_alpha: torch.Tensor) -> NoiseGrid:
    """Tables of a variance-preserving scheduler with `alphas_cumprod`; `timesteps` noisiest first."""
    order = timesteps.flip(0).long()
    alphas = torch.cat([final_alpha.reshape(1).double(), copy.alphas_cumprod.double()[order]])
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), order.double()])
    return NoiseGrid(alphas.sqrt(), (1 - alphas).sqrt(), steps, copy.config.prediction_type, _clip_of(copy))


def grid_from_sigmas(copy: Any) -> NoiseGrid:
    """Tables of a scheduler that keeps `sigmas` (noisiest first, final one last): flow, or sigma / alpha of diffusion."""
    flow = getattr(copy.config, "use_flow_sigmas", True)
    sigmas = copy.sigmas.double().flip(0)
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), copy.timesteps.double().flip(0)])
    prediction = (
        getattr(copy.config, "prediction_type", "flow_prediction") if "prediction_type" in copy.config else "flow_prediction"
    )
    if flow != (prediction in FLOW_PREDICTIONS):
        raise GenAttnError(
            f"use_flow_sigmas={flow} and prediction_type={prediction!r} do not go together; fix the scheduler's config"
        )
    alpha = 1 - sigmas if flow else (1 + sigmas.square()).rsqrt()
    return NoiseGrid(alpha, sigmas if flow else sigmas * alpha, steps, prediction)


def _clip_of(copy: Any) -> float | None:
    if getattr(copy.config, "thresholding", False):
        raise GenAttnError(
            f"thresholding=True of {type(copy).__name__} looks at whole clips and has no per-frame form; set it False"
        )
    # the CogVideoX DDIM keeps clip_sample in its config and never looks at it
    clips = getattr(copy.config, "clip_sample", False) and not type(copy).__name__.startswith("CogVideoX")
    return float(copy.config.clip_sample_range) if clips else None
