"""The tiny video autoencoder: a stock `AutoencoderKLWan`, 4x in space, 4x in time, trained on the tiny world.

Stills first, then short clips. A Wan convolution sees a still as two frames of zeros and the still, so only the last
temporal slice of its kernel works: `causal_start` sets the other slices to zero and makes the time convolutions pass
frames on, and what the stills taught carries over to clips unharmed; `still_convolutions` skips the zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanResample

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.world import render_at, sample_scene

CLIP_FRAMES = 29
KL_WEIGHT = 1e-3
FOREGROUND_WEIGHT = 4.0


def build_vae(z_dim: int = 6, base_dim: int = 12, decoder_base_dim: int = 16) -> AutoencoderKLWan:
    """A fresh autoencoder: [B, 3, 1 + 4 n, 4 h, 4 w] <-> [B, z_dim, 1 + n, h, w]."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )
    causal_start(vae)
    return vae


@torch.no_grad()
def causal_start(vae: AutoencoderKLWan) -> None:
    """Start as a per-frame autoencoder that repeats frames in time."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] = 0
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode in ("upsample3d", "downsample3d"):
            convolution, dim = module.time_conv, module.dim
            kernel = convolution.weight
            kernel.zero_()
            for start in range(0, kernel.shape[0], dim):
                kernel[start : start + dim, :, -1, 0, 0] = torch.eye(dim)
            if convolution.bias is not None:
                convolution.bias.zero_()


@contextmanager
def still_convolutions(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within, single frames go through two-dimensional convolutions: the same result, a third of the work."""
    changed = [m for m in vae.modules() if isinstance(m, WanCausalConv3d)]
    for module in changed:
        vars(module)["forward"] = MethodType(_still_forward, module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _still_forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    if x.shape[2] != 1 or cache_x is not None or self.stride != (1, 1, 1):
        return WanCausalConv3d.forward(self, x, cache_x)
    padding = (self._padding[2], self._padding[0])
    return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding)[:, :, None]


def to_model_range(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in [-1, 1]."""
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise GenAttnError(f"clips must be uint8 [B, T, H, W, 3], got {clips.dtype} {clips.shape}; stack rendered clips")
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def training_clips(batch: int, frames: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random pieces of random scenes at the speed of a 29-frame clip: float32 [B, 3, frames, size, size]."""
    clips = []
    for _ in range(batch):
        seed = int(torch.randint(0, 2**31, (1,), generator=generator))
        length = (frames - 1) / (CLIP_FRAMES - 1)
        start = float(torch.rand(1, generator=generator)) * (1.0 - length)
        time = np.linspace(start, start + length, frames, dtype=np.float32)
        clips.append(render_at(sample_scene(seed, two_objects=0.5), time, size, size))
    return to_model_range(np.stack(clips))


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + MSE, heavier on and around the objects, plus a small KL term.

    Args:
        vae: the autoencoder.
        clips: float [B, 3, T, H, W] in [-1, 1].
        generator: CPU generator for the posterior sample.
    """
    posterior = vae.encode(clips).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    error = (decoded - clips).abs()
    weight = 1.0 + FOREGROUND_WEIGHT * _near_objects(clips)
    weight = weight / weight.mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return (weight * (error + 2.0 * error**2)).mean() + KL_WEIGHT * kl


def _near_objects(clips: torch.Tensor) -> torch.Tensor:
    """1 where a pixel or a neighbour within 2 differs from the background, [B, 1, T, H, W]."""
    background = clips[:, :, :, :1, :1]
    objects = ((clips - background).abs().amax(1, keepdim=True) > 0.1).float()
    return F.max_pool3d(objects, (1, 5, 5), stride=1, padding=(0, 2, 2))


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of clips [B, 3, T, H, W] against their reconstructions from the mean."""
    decoded = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return float(10 * torch.log10(4.0 / (decoded.float() - clips).square().mean()))


@torch.no_grad()
def widen_latents(vae: AutoencoderKLWan, channels: int) -> AutoencoderKLWan:
    """The same autoencoder with `channels` more latent channels that the encoder leaves at 0 and the decoder ignores.

    Args:
        vae: the autoencoder, with z_dim latent channels.
        channels: how many to add, >= 1; their mean is taken as 0 and their standard deviation as 1.

    Raises:
        GenAttnError: for fewer than 1.
    """
    if channels < 1:
        raise GenAttnError(f"channels must be >= 1, got {channels}; keep the autoencoder as it is")
    config: Any = vae.config
    old, new = config.z_dim, config.z_dim + channels
    wide = AutoencoderKLWan.from_config(
        {
            **config,
            "z_dim": new,
            "latents_mean": [*config.latents_mean, *[0.0] * channels],
            "latents_std": [*config.latents_std, *[1.0] * channels],
        }
    )
    # moments are [means, log variances]; the added channels' places are last in each half
    moments = [*range(old), *range(new, new + old)]
    weights, wanted = vae.state_dict(), wide.state_dict()
    for name, value in weights.items():
        target = wanted[name]
        if target.shape == value.shape:
            target.copy_(value)
            continue
        target.zero_()
        rows = moments if len(target) == 2 * new else list(range(len(value)))
        columns = moments if target.ndim > 1 and target.shape[1] == 2 * new else list(range(value.shape[1:2].numel()))
        if target.ndim == 1:
            target[rows] = value
        else:
            target[torch.tensor(rows)[:, None], torch.tensor(columns)[None]] = value
    wide.quant_conv.bias[new + old :] = -20.0
    return wide.eval()


@torch.no_grad()
def narrow_latents(vae: AutoencoderKLWan, channels: int) -> AutoencoderKLWan:
    """Undo `widen_latents`: the same autoencoder without its last `channels` latent channels, in float32.

    Raises:
        GenAttnError: unless some latent channels are left.
    """
    config: Any = vae.config
    new = config.z_dim - channels
    if channels < 1 or new < 1:
        raise GenAttnError(f"channels must be in [1, {config.z_dim - 1}], got {channels}; leave at least one")
    statistics = {name: list(config[name][:new]) for name in ("latents_mean", "latents_std")}
    narrow = AutoencoderKLWan.from_config({**config, "z_dim": new, **statistics})
    moments = torch.tensor([*range(new), *range(config.z_dim, config.z_dim + new)])
    weights = vae.state_dict()
    for name, target in narrow.state_dict().items():
        value = weights[name]
        for axis in range(min(target.ndim, 2)):
            if value.shape[axis] != target.shape[axis]:
                # moments are [means, log variances]; a decoder's side has means alone
                kept = moments if target.shape[axis] == 2 * new else moments[:new]
                value = value.index_select(axis, kept)
        target.copy_(value)
    return narrow.eval()
