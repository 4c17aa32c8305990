"""Fine-tuning a model whose latents say where they are: tiny-wan's denoiser makes eleven channels of place with the rest.

The encoder leaves them empty, so they are added to what it gives, and in the loss they weigh what they weighed when the model
was made. Latents of any other model go through untouched.
"""

import torch

from genattn.pipelines.training.places import LATENT_FRAMES, POSITION_CHANNELS, loss_weight, with_positions


def with_places(latents: torch.Tensor) -> torch.Tensor:
    """Encoded latents [B, C, F, h, w] with their empty channels of place filled in; others as they are.

    Places are stretched over the clip, whatever its length, as the tiny world's motions are.
    """
    contents = latents[:, :-POSITION_CHANNELS]
    if latents.shape[1] <= POSITION_CHANNELS or bool(latents[:, -POSITION_CHANNELS:].any()) or not bool(contents.any()):
        return latents
    return _placed(contents)


def place_weight(latents: torch.Tensor) -> torch.Tensor | None:
    """Weight of each squared error as in the model's own training, [B, C, F, h, w]; None for latents without places.

    Args:
        latents: clean, [B, C, F, h, w].
    """
    if latents.shape[1] <= POSITION_CHANNELS:
        return None
    placed = _placed(latents[:, :-POSITION_CHANNELS])
    return loss_weight(latents) if torch.allclose(placed, latents, atol=1e-3) else None


def _placed(contents: torch.Tensor) -> torch.Tensor:
    frames = contents.shape[2]
    return with_positions(contents, (torch.arange(frames) + 0.5) * (LATENT_FRAMES / frames) - 0.5)
