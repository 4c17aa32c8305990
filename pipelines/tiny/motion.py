"""The parts of tiny-animatediff: a motion UNet with its text encoder, tokenizer and scheduler, all stock classes.

A training step may show any frames of a clip, single ones too: `frames_at` tells the motion modules which they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, MotionAdapter, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.text import build_tokenizer

FRAMES = 16
TEXT_TOKENS = 24


@dataclass(frozen=True)
class MotionSize:
    """Channels of the UNet's four levels, layers of each, heads of the motion modules, width of the text."""

    channels: tuple[int, int, int, int] = (32, 64, 64, 96)
    layers: int = 1
    heads: int = 2
    text_width: int = 64

    def __post_init__(self) -> None:
        if min(*self.channels, self.layers, self.heads) < 1 or any(c % 8 or c % self.heads for c in self.channels):
            raise GenAttnError(f"channels must be multiples of 8 and of heads, layers and heads >= 1, got {self}; change them")


class TinyMotion(nn.Module):
    """Text encoder and motion UNet as one trainable module."""

    def __init__(self, vocabulary: int, size: MotionSize | None = None) -> None:
        super().__init__()
        size = size or MotionSize()
        self.text_encoder = build_text_encoder(vocabulary, size)
        self.unet = build_unet(size)

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predicted velocity [B, C, F, H, W] for noisy latents of that shape, timestep int [B], token ids [B, L].

        frames: int [B, F], which frames of the clip they are; the first F if not given.
        """
        embeds = self.text_encoder(ids)[0].repeat_interleave(noisy.shape[2], 0)
        if frames is None:
            return self.unet(noisy, timestep, embeds).sample
        with frames_at(self.unet, frames):
            return self.unet(noisy, timestep, embeds).sample


@contextmanager
def frames_at(unet: nn.Module, frames: torch.Tensor) -> Iterator[None]:
    """Within, the motion modules take their inputs for the given frames of a clip instead of its first ones.

    Args:
        unet: a `UNetMotionModel`; its motion modules see [B * h * w, F, C].
        frames: int [B, F], places in the clip.
    """

    def place(module: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        (hidden,) = args
        return hidden + module.pe[0][frames].repeat_interleave(len(hidden) // len(frames), 0)

    modules = [module for module in unet.modules() if isinstance(module, SinusoidalPositionalEmbedding)]
    hooks = [module.register_forward_hook(place) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def build_text_encoder(vocabulary: int, size: MotionSize) -> CLIPTextModel:
    """A fresh CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=size.text_width,
            intermediate_size=2 * size.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def build_unet(size: MotionSize) -> Any:
    """A fresh `UNetMotionModel` over latents of four channels: four levels, the lowest without cross-attention."""
    return UNetMotionModel(
        sample_size=16,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
        cross_attention_dim=size.text_width,
        num_attention_heads=size.heads,
        motion_num_attention_heads=size.heads,
        motion_max_seq_length=2 * FRAMES,
        norm_num_groups=8,
    )


def build_scheduler() -> Any:
    """DDIM that begins at pure noise, so that backgrounds of any brightness can be had."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The world's words, padded to the text encoder's length."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 24], as the stock pipeline makes them."""
    settings = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **settings).input_ids


def motion_adapter_of(unet: Any, size: MotionSize) -> Any:
    """The motion modules of a UNet as an adapter, which other UNets of the same sizes can take."""
    adapter: Any = MotionAdapter(
        block_out_channels=size.channels,
        motion_layers_per_block=size.layers,
        motion_num_attention_heads=size.heads,
        motion_max_seq_length=2 * FRAMES,
        motion_norm_num_groups=8,
    )
    adapter.load_state_dict({name: value for name, value in unet.state_dict().items() if "motion_modules" in name})
    return adapter.eval()
