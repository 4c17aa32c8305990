"""The first frame of a long run while its steps go on: a picture that is replaced every few seconds.

    x_i, x_i+1 -> the straight line through both, at noise 0 -> first latent frame -> VAE -> PNG

The line is exact for a flow model whose velocity no longer changes; early previews are therefore blurred, not noisy.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genattn.apps.sampling.output_files import write_image


class StepPreview:
    """A pipeline's `callback_on_step_end` that keeps a picture of the first frame at `path`, at most every `every` seconds.

    Latents in packed form (FLUX, LTX) and pipelines without such a callback get none. `seconds`: what the previews cost.
    """

    def __init__(self, path: Path, every: float = 20.0) -> None:
        self.path, self.every = path, every
        self.seconds = 0.0
        self._before: torch.Tensor | None = None
        self._last = time.monotonic()

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline; hands `values` on as they are."""
        latents = values.get("latents")
        begin = time.monotonic()
        if begin - self._last >= self.every and latents is not None and latents.ndim in (4, 5):
            try:
                with torch.no_grad():
                    picture = first_frame(pipe, clean_estimate(pipe.scheduler, step, self._before, latents))
                write_image(self.path, picture, {"preview": True, "step": step + 1})
            except (OSError, torch.OutOfMemoryError):  # a preview is not worth the run it shows
                self.every = math.inf
            self._last = time.monotonic()
            self.seconds += self._last - begin
        self._before = latents
        return values

    def remove(self) -> None:
        """Take the picture away; the finished file has come."""
        self.path.unlink(missing_ok=True)


def clean_estimate(scheduler: Any, step: int, before: torch.Tensor | None, after: torch.Tensor) -> torch.Tensor:
    """Where the line through the samples before and after `step` meets noise 0; `after` itself where that is not known.

    The line is straight for flow matching, whose schedulers keep `sigmas` in [0, 1]; others get the sample as it is.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    flow = "Flow" in type(scheduler).__name__ or getattr(scheduler.config, "use_flow_sigmas", False)
    if before is None or sigmas is None or not flow or step + 1 >= len(sigmas) or before.shape != after.shape:
        return after
    high, low = float(sigmas[step]), float(sigmas[step + 1])
    if high <= low:
        return after
    return after - low * (before - after) / (high - low)


def first_frame(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """The first frame of model latents [B, C, h, w] or [B, C, F, h, w] (CogVideoX: [B, F, C, h, w]) as uint8 [H, W, 3]."""
    vae = pipe.vae
    if latents.ndim == 5:
        frames_first = type(pipe).__name__.startswith("CogVideoX")
        latents = latents.transpose(1, 2)[:, :, :1] if frames_first else latents[:, :, :1]
        if type(vae).__name__ == "AutoencoderKL":  # knows pictures only
            latents = latents[:, :, 0]
    picture = vae.decode(_for_vae(vae.config, latents[:1].float()).to(vae.dtype), return_dict=False)[0]
    picture = picture[0, :, 0] if picture.ndim == 5 else picture[0]
    pixels: np.ndarray = ((picture.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def _for_vae(config: Any, latents: torch.Tensor) -> torch.Tensor:
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1) + (1,) * (latents.ndim - 2)
        return latents * torch.tensor(std).reshape(shape).to(latents) + torch.tensor(mean).reshape(shape).to(latents)
    return latents / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)
