"""Tiny video denoisers whose pipeline packs text, references, sound and video into one sequence and says where each stands."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import TinyModel, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]

MINIMAX_H3: Drawn = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 24,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 6,
    "patch_size": (1, 2, 2),
    "text_dim": 8,
    "freq_dim": 8,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}
COSMOS3: Drawn = {
    "head_dim": 6,
    "hidden_size": 24,
    "intermediate_size": 24,
    "latent_channel": 2,
    "latent_patch_size": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "patch_latent_dim": 8,
    "rope_axes_dim": [1, 1, 1],
    "rope_theta": 10000.0,
    "vocab_size": 32,
    "sound_gen": True,
    "sound_dim": 3,
}


def _places(times: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """MiniMax-H3's (t, h, w) of a raster, float64 [F * H * W, 3]: rows and columns spread over the same area."""
    rows, columns = (torch.arange(n, dtype=torch.float64) * 32 / math.sqrt(height * width) for n in (height, width))
    return torch.stack([axis.flatten() for axis in torch.meshgrid(times, rows, columns, indexing="ij")], dim=1)


def _sound(start: float, latents: int) -> torch.Tensor:
    """The places of a soundtrack of two channels, one behind the other."""
    places = torch.zeros(2 * latents, 3, dtype=torch.float64)
    places[:, 0], places[latents:, 2] = start + torch.arange(latents).repeat(2), 32.0
    return places


def minimax_h3(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Text, the first frame as a condition, sound, video: three levels of noise in one forward."""
    words, latents, (frames, height, width) = 7, 4, grid
    times = words + 5 / 3 * torch.tensor([0, 1, *[4] * (frames - 2)][:frames], dtype=torch.float64).cumsum(0)
    text = torch.zeros(words, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(words)
    parts = [text, _places(times[:1], height, width), _sound(float(words), latents), _places(times, height, width)]
    return _inputs(g, parts, [1, 0, 2, 0])


def minimax_h3_reference(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Text, a picture, a sound, a clip of two frames with its sound (all references), then sound and video."""
    words, latents, (frames, height, width) = 7, 4, grid
    text = torch.zeros(words, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(words)
    times = words + 8.0 + 5 / 3 * torch.arange(frames, dtype=torch.float64)
    references = [
        _places(torch.tensor([7.0]).double(), 4, 6),
        _sound(8.0, 2),
        _sound(9.0, 3),
        _places(torch.tensor([9.0, 10.0]).double(), 4, 4),
    ]
    parts = [text, *references, _sound(float(times[0]), latents), _places(times, height, width)]
    return _inputs(g, parts, [1, 0, 2, 2, 0, 2, 0])


def _inputs(g: torch.Generator, parts: list[torch.Tensor], kinds: list[int]) -> Drawn:
    """parts: the places of text, references, sound, video. kinds: 0 video, 1 text, 2 sound. The last two are made."""
    lengths = [len(part) for part in parts]
    tags = torch.cat([torch.full((n,), kind) for kind, n in zip(kinds, lengths)])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    noise = torch.zeros(len(tags), dtype=torch.long)  # the video's own level, and text's
    for _, start, n in list(zip(kinds, starts, lengths))[1:-2]:
        noise[start : start + n] = 2
    noise[starts[-2] : starts[-1]] = 1
    rows = {name: (tags == kind).nonzero().flatten() for name, kind in (("video", 0), ("text", 1), ("audio", 2))}
    return {
        "hidden_states": normal(g, 1, len(rows["video"]), 16),
        "audio_hidden_states": normal(g, 1, len(rows["audio"]), 6),
        "encoder_hidden_states": normal(g, 1, len(rows["text"]), 8),
        "timestep": torch.tensor([0.25, 0.4, 1.0]),
        "timestep_indices": noise,
        "token_tags": tags,
        "position_ids": torch.cat(parts),
        **{f"{name}_indices": found for name, found in rows.items()},
    }


def cosmos3(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Text that sees only what stands before it, then video and sound that see everything; the first frame is given."""
    words, sounds, (frames, height, width) = 7, 5, grid
    video = words + torch.arange(math.prod(grid))
    sound = int(video[-1]) + 1 + torch.arange(sounds)
    positions = torch.arange(words + len(video) + sounds).expand(3, -1).clone()
    places = torch.meshgrid(torch.arange(frames) + 15000, torch.arange(height), torch.arange(width), indexing="ij")
    positions[:, video] = torch.stack([axis.flatten() for axis in places])
    noisy = torch.arange(1, frames)
    made = video[height * width :]
    return {
        "input_ids": torch.randint(0, 32, (words,), generator=g),
        "text_indexes": torch.arange(words),
        "position_ids": positions,
        "und_len": words,
        "sequence_length": positions.shape[1],
        "vision_tokens": [normal(g, 1, 2, frames, 2 * height, 2 * width)],
        "vision_token_shapes": [tuple(grid)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": made,
        "vision_timesteps": torch.full((len(made),), 500.0),
        "vision_noisy_frame_indexes": [noisy],
        "sound_tokens": [normal(g, 3, sounds)],
        "sound_token_shapes": [(sounds, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.full((sounds,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sounds)],
    }


_H3 = "MiniMaxH3Transformer3DModel"
TINY: dict[str, TinyModel] = {
    "minimax-h3": TinyModel(_H3, MINIMAX_H3, minimax_h3, axes="BSC"),
    "minimax-h3-reference": TinyModel(_H3, MINIMAX_H3, minimax_h3_reference, axes="BSC"),
    "cosmos3": TinyModel("Cosmos3OmniTransformer", COSMOS3, cosmos3, latents="vision_tokens", axes="[BCFHW]", since=(0, 40)),
}
