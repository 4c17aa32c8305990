"""Settings and inputs of the tiny denoisers; sizes from diffusers' own model tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class TinyModel:
    """A class of diffusers by name, its settings, and a function that draws inputs."""

    model: str
    config: dict[str, Any]
    inputs: Inputs

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The model with random weights."""
        return getattr(diffusers, self.model)(**config)  # type: ignore[no-any-return]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal noise from `generator`."""
    return torch.randn(shape, generator=generator)


def image_ids(height: int, width: int, columns: int = 3, reference: int = 0) -> torch.Tensor:
    """Token positions (reference, row, column[, ...]) of one image in raster order, [H * W, columns]."""
    ids = torch.zeros(height * width, columns)
    ids[:, 0] = reference
    ids[:, 1] = torch.arange(height).repeat_interleave(width)
    ids[:, 2] = torch.arange(width).repeat(height)
    return ids


def _wan(g: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(g, 1, 16, 3, 16, 12),
        "encoder_hidden_states": normal(g, 1, 12, 32),
        "timestep": torch.tensor([500]),
    }


def _sd3(g: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(g, 2, 4, 12, 16),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "pooled_projections": normal(g, 2, 64),
        "timestep": torch.tensor([500, 500]),
    }


def _flux(g: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(g, 1, 8 * 12, 4),
        "encoder_hidden_states": normal(g, 1, 10, 32),
        "pooled_projections": normal(g, 1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(8, 12),
        "txt_ids": torch.zeros(10, 3),
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
SD3 = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}

MODELS: dict[str, TinyModel] = {
    "wan": TinyModel("WanTransformer3DModel", WAN, _wan),
    "sd3": TinyModel("SD3Transformer2DModel", SD3, _sd3),
    "flux": TinyModel("FluxTransformer2DModel", FLUX, _flux),
}
