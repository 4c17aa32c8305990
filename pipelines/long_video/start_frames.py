"""Begin a film from a picture or a video instead of a sampled clip.

"renoise": the given latents fill the queue from its clean end, so the first frames come out almost as they were given and
later ones ever freer; a short clip is held on its last latent. Any text-to-video checkpoint serves.
"condition": the given latents are the clean beginning of an ordinary clip, which the model continues (`queue/given_frames`).
"""

from typing import Any

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.picture_file import upright_rgb
from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser

StartFrames = (
    Any  # a PIL image, a list of them, a uint8 array [H, W, 3] or [T, H, W, 3], or a float tensor [T, 3, H, W] in [-1, 1]
)


def frames_to_tensor(start: StartFrames, size: tuple[int, int]) -> torch.Tensor:
    """The given frames as float [1, 3, T, H, W] in [-1, 1]; refuses another size than the film's."""
    if isinstance(start, torch.Tensor):
        frames = start if start.ndim == 4 else start[None]
        if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
            raise GenAttnError(
                f"start as a tensor must be float [T, 3, H, W] in [-1, 1], got {start.dtype} {tuple(start.shape)}"
            )
    else:
        pictures = start if isinstance(start, (list, tuple)) else [start] if getattr(start, "ndim", 3) == 3 else list(start)
        arrays = [np.asarray(upright_rgb(p) if hasattr(p, "convert") else p) for p in pictures]
        if not arrays or any(a.dtype != np.uint8 or a.ndim != 3 or a.shape[2] != 3 for a in arrays):
            raise GenAttnError(f"start must be pictures, uint8 [H, W, 3] each, got {[(a.dtype, a.shape) for a in arrays[:2]]}")
        if len({a.shape for a in arrays}) > 1:
            raise GenAttnError(f"start must be pictures of one size, got {sorted({a.shape[:2] for a in arrays})}; resize them")
        frames = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if tuple(frames.shape[-2:]) != size:
        raise GenAttnError(
            f"start must be {size[0]} x {size[1]} like the film, got {frames.shape[-2]} x {frames.shape[-1]}; resize it"
        )
    return frames.permute(1, 0, 2, 3)[None].float()


def given_latents(base: FrameDenoiser, start: StartFrames, size: tuple[int, int]) -> torch.Tensor:
    """The given frames as clean latents [1, C, G, h, w]; a video must end where the VAE can end."""
    frames = frames_to_tensor(start, size)
    base.decoder().latents_for(frames.shape[2])
    return base.encode_frames(frames)


def clip_from_frames(base: FrameDenoiser, start: StartFrames, size: tuple[int, int], working: int) -> torch.Tensor:
    """Clean latents [1, C, working, h, w] that fill the queue: the given frames, then their last latent held.

    working: slots of the queue to fill. A video must fit into them, and end where the VAE can end.
    """
    frames = frames_to_tensor(start, size)
    decoder = base.decoder()
    if frames.shape[2] == 1:
        # a still is encoded as a few equal frames, so that the held latent is that of a standing picture, not of a first frame
        frames = frames.expand(-1, -1, decoder.frames_for(min(3, working)), -1, -1)
    latents = decoder.latents_for(frames.shape[2])
    if latents > working:
        raise GenAttnError(
            f"start must fit into the queue's {working} latents ({decoder.frames_for(working)} frames), got {frames.shape[2]}"
        )
    clip = base.encode_frames(frames)
    return torch.cat([clip, clip[:, :, -1:].expand(-1, -1, working - clip.shape[2], -1, -1)], 2)
