"""Latents that say where they are: channels of place beside the contents, and what each error weighs in the loss.

The tiny models are trained with them (pipelines/tiny/denoiser.py says why), so whoever tunes such a model adds and weighs them
in the same way.
"""

import math

import torch
import torch.nn.functional as F

LATENT_FRAMES = 8
POSITION_WAVES = (3, 4, 4)
POSITION_CHANNELS = sum(POSITION_WAVES)
POSITION_AMPLITUDE = 6.0
OBJECT_WEIGHT = 6.0


def with_positions(latents: torch.Tensor, frames: torch.Tensor | None = None, clip_frames: int = LATENT_FRAMES) -> torch.Tensor:
    """Append the eleven channels of place: along each axis cosines of one half wave, of two, and so on.

    Args:
        latents: [B, C, F, H, W].
        frames: int [F] or [B, F], which of the clip's latent frames these are; None for the first F.
        clip_frames: how many latent frames the whole clip has.

    Returns:
        [B, C + 11, F, H, W].
    """
    batch, _, count, height, width = latents.shape
    places = torch.arange(count, device=latents.device) if frames is None else frames.to(latents.device)
    rows, columns = (torch.arange(size, device=latents.device) for size in (height, width))
    axes = [
        (places.view(-1, 1, count, 1, 1), clip_frames, POSITION_WAVES[0]),
        (rows.view(1, 1, 1, -1, 1), height, POSITION_WAVES[1]),
        (columns.view(1, 1, 1, 1, -1), width, POSITION_WAVES[2]),
    ]
    waves = []
    for place, size, number in axes:
        angle = math.pi * (place + 0.5) / size
        waves += [(2**0.5 * POSITION_AMPLITUDE) * torch.cos(angle * (wave + 1)) for wave in range(number)]
    return torch.cat([latents, *(w.to(latents.dtype).expand(batch, 1, count, height, width) for w in waves)], 1)


def loss_weight(latents: torch.Tensor) -> torch.Tensor:
    """Weight of each squared error of the velocity: objects by `object_weight`, places half of all, as if their waves had
    amplitude 1.

    The waves of place are large so that they show early in the noise; unweighed they would be all of the loss.

    Args:
        latents: clean, with their channels of place, [B, C, F, H, W].

    Returns:
        [B, C, F, H, W]; the mean of weighted errors is the mean over contents plus half the mean over places.
    """
    contents = latents.shape[1] - POSITION_CHANNELS
    objects = object_weight(latents[:, :contents]).expand(-1, contents, -1, -1, -1) * (latents.shape[1] / contents)
    share = 0.5 / POSITION_AMPLITUDE**2 * latents.shape[1] / POSITION_CHANNELS
    return torch.cat([objects, torch.full_like(latents[:, contents:], share)], 1)


def object_weight(latents: torch.Tensor) -> torch.Tensor:
    """Weight of each cell in the loss: `OBJECT_WEIGHT` times the background's on objects and their neighbours, mean 1.

    An object is where some channel is more than half a standard deviation from its frame's median.

    Args:
        latents: normalised [B, C, F, H, W], without channels of place.

    Returns:
        [B, 1, F, H, W].
    """
    background = latents.flatten(3).median(-1).values[..., None, None]
    objects = ((latents - background).abs().amax(1, keepdim=True) > 0.5).to(latents.dtype)
    weight = 1.0 + (OBJECT_WEIGHT - 1.0) * F.max_pool3d(objects, (1, 3, 3), stride=1, padding=(0, 1, 1))
    return weight / weight.mean()
