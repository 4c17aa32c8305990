"""Tiny denoisers of sound: one token per piece of time. `grid` is (pieces of time,)."""

from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import TinyModel, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]

ACE_STEP: Drawn = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "in_channels": 24,
    "audio_acoustic_hidden_dim": 8,
    "patch_size": 2,
    "rope_theta": 10000.0,
    "sliding_window": 16,
}
STABLE_AUDIO: Drawn = {
    "sample_size": 32,
    "in_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_attention_heads": 2,
    "out_channels": 3,
    "cross_attention_dim": 16,
    "time_proj_dim": 8,
    "global_states_input_dim": 8,
    "cross_attention_input_dim": 4,
}
STABLE_AUDIO3: Drawn = {
    "io_channels": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "cond_token_dim": 12,
    "global_cond_dim": 8,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 8,
    "num_memory_tokens": 6,
}
LONGCAT_AUDIO: Drawn = {"dit_dim": 64, "dit_depth": 3, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False}
MUSIC3: Drawn = {
    "in_channels": 8,
    "condition_dim": 16,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "ff_inner_dim": 32,
    "rotary_dim": 4,
    "fourier_embedding_dim": 8,
}


def ace_step(g: torch.Generator, grid: Grid = (24,)) -> Drawn:
    """Latents beside their context, two latents to a token; every other layer has a window of its own."""
    return {
        "hidden_states": normal(g, 2, 2 * grid[0], 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "timestep_r": torch.tensor([0.25, 0.25]),
        "encoder_hidden_states": normal(g, 2, 10, 32),
        "context_latents": normal(g, 2, 2 * grid[0], 16),
    }


def stable_audio(g: torch.Generator, grid: Grid = (24,)) -> Drawn:
    """One token of length and loudness before the sound."""
    angles = normal(g, grid[0] + 1, 4)
    return {
        "hidden_states": normal(g, 2, 3, grid[0]),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": normal(g, 2, 7, 4),
        "global_hidden_states": normal(g, 2, 1, 8),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def stable_audio3(g: torch.Generator, grid: Grid = (24,)) -> Drawn:
    """Memory tokens before the sound; each attention is the difference of two."""
    return {
        "hidden_states": normal(g, 2, 4, grid[0]),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": normal(g, 2, 7, 12),
        "global_hidden_states": normal(g, 2, 8),
    }


def longcat_audio(g: torch.Generator, grid: Grid = (24,)) -> Drawn:
    """Text by cross-attention."""
    return {
        "hidden_states": normal(g, 1, grid[0], 8),
        "encoder_hidden_states": normal(g, 1, 10, 32),
        "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
        "timestep": torch.ones(1) / 2,
    }


def music3(g: torch.Generator, grid: Grid = (24,)) -> Drawn:
    """The time as a token before the sound; the condition is added channel by channel."""
    return {
        "hidden_states": normal(g, 1, 8, grid[0]),
        "encoder_hidden_states": normal(g, 1, grid[0], 16),
        "timestep": torch.tensor([0.5]),
    }


_SOUND: Any = {"large": (384,)}
TINY: dict[str, TinyModel] = {
    "ace-step": TinyModel("AceStepTransformer1DModel", ACE_STEP, ace_step, axes="BSC", **_SOUND),
    "stable-audio": TinyModel("StableAudioDiTModel", STABLE_AUDIO, stable_audio, axes="BCS", **_SOUND),
    "stable-audio-3": TinyModel("StableAudio3DiTModel", STABLE_AUDIO3, stable_audio3, axes="BCS", **_SOUND),
    "longcat-audio": TinyModel("LongCatAudioDiTTransformer", LONGCAT_AUDIO, longcat_audio, axes="BSC", **_SOUND),
    "minimax-music3": TinyModel("MiniMaxMusic3Transformer1DModel", MUSIC3, music3, axes="BCS", **_SOUND),
}
