"""Encoded clips of the tiny world on disk: what the denoiser trains on, so that the autoencoder runs once.

A cache is a folder of safetensors shards, each with `latents` [N, C, F, H / 4, W / 4] in float16 (as encoded, not
normalised; F is 1 + (T - 1) / 4 of a video autoencoder and T of one for pictures) and the N captions as metadata. A
shard is a function of its number alone: writing resumes at the first missing one, and several processes can share the work.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.vae import still_convolutions, to_model_range
from genattn.pipelines.tiny.world import caption, render, sample_scene, settle
from genattn.whole_file import whole_file

SHARD = 64


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKLWan | AutoencoderKL,
    folder: Path,
    shards: range,
    minutes: float,
    frames: int = 29,
    size: int = 64,
    two_objects: float = 0.15,
    settled: bool = False,
) -> int:
    """Render, caption and encode training scenes, a shard of 64 at a time; existing shards are kept.

    Args:
        vae: the trained autoencoder; one for pictures takes clips frame by frame.
        folder: where the shards go.
        shards: which shard numbers; shard k holds the scenes of seeds 64 k to 64 k + 63.
        minutes: wall-clock limit, > 0.
        frames: pixel frames T of each clip; 1 caches the first frame of each clip as a still.
        size: pixels of height and width.
        two_objects: share of two-object scenes.
        settled: draw every object at its usual place, so that a caption says all there is to see.

    Returns:
        How many shards the folder holds of those asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vae.eval()
    device = next(vae.parameters()).device
    begun, done = time.monotonic(), 0
    for number in tqdm(shards, desc=folder.name, mininterval=5.0):
        path = folder / f"latents-{number:05d}.safetensors"
        if not path.exists():
            if time.monotonic() - begun > minutes * 60:
                continue
            scenes = [sample_scene(seed, two_objects=two_objects) for seed in range(SHARD * number, SHARD * (number + 1))]
            scenes = [settle(scene) for scene in scenes] if settled else scenes
            parts = []
            for first in range(0, SHARD, 8):
                clips = np.stack([render(scene, max(frames, 2), size, size)[:frames] for scene in scenes[first : first + 8]])
                parts.append(_encode(vae, to_model_range(clips).to(device)).half().cpu())
            metadata = {"captions": json.dumps([caption(scene) for scene in scenes])}
            with whole_file(path) as part:
                save_file({"latents": torch.cat(parts).contiguous()}, part, metadata=metadata)
        done += 1
    return done


def _encode(vae: AutoencoderKLWan | AutoencoderKL, clips: torch.Tensor) -> torch.Tensor:
    if isinstance(vae, AutoencoderKL):
        latents = vae.encode(clips.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
        return latents.unflatten(0, (len(clips), -1)).transpose(1, 2)
    if clips.shape[2] > 1:
        return vae.encode(clips).latent_dist.mode()
    with still_convolutions(vae):
        return vae.encode(clips).latent_dist.mode()


@torch.autocast("cpu", enabled=False)  # it cannot join float16, which the first step of a phase may ask for within it
def load_latents(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Every shard of a folder: latents float16 [N, C, F, H, W] and N captions.

    Raises:
        GenAttnError: if there is none.
    """
    latents, captions = [], []
    for path in sorted(folder.glob("latents-*.safetensors")):
        with safe_open(path, "pt") as file:
            latents.append(file.get_tensor("latents"))
            captions += json.loads(file.metadata()["captions"])
    if not latents:
        raise GenAttnError(f"the latent cache must hold at least one shard, got none in {folder}; run phase latents")
    return torch.cat(latents), captions


def measure_latents(latents: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents [N, C, F, H, W], as a Wan autoencoder's config wants them."""
    values = latents.float().transpose(0, 1).flatten(1)
    return values.mean(1).tolist(), values.std(1).tolist()
