"""The tiny denoiser: a stock `WanTransformer3DModel` and its text encoder, trained jointly by flow matching.

    x_s = (1 - s) x_0 + s noise        the model learns noise - x_0 at timestep 1000 s

Rotary embeddings are relative and say nothing of a token's place in pure noise, which a small model takes long to work
around. So eleven more latent channels hold where a latent is, as cosines along frames, rows and columns; the denoiser
learns to make them with the rest, and the exported autoencoder decodes without looking at them.

The stock pipeline pads every prompt to 512 embeddings of zeros, which cross-attention sees; as they are all the same
key, training keeps a few of them and adds the logarithm of their number to their logits, which is exact.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel
from torch import nn

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.text import build_text_encoder, encode_text
from genattn.pipelines.training.places import loss_weight

FLOW_SHIFT = 5.0
CAPTION_DROPOUT = 0.1
PADDED_LENGTHS = (512, 512, 512, 226, 64)


@dataclass(frozen=True)
class DenoiserSize:
    """Shape of the transformer: `heads` x `head_dim` wide, `layers` deep, `ffn` in between; a token is `patch` x `patch`."""

    heads: int = 4
    head_dim: int = 32
    layers: int = 5
    ffn: int = 384
    patch: int = 2

    def __post_init__(self) -> None:
        if min(self.heads, self.layers, self.ffn, self.patch) < 1 or self.head_dim < 12 or self.head_dim % 2:
            raise GenAttnError(f"sizes must be >= 1 and head_dim even and >= 12, got {self}; enlarge the model")


class TinyDenoiser(nn.Module):
    """Text encoder and transformer as one trainable module."""

    def __init__(self, z_dim: int, vocabulary: int, size: DenoiserSize | None = None) -> None:
        super().__init__()
        size = size or DenoiserSize()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_transformer(z_dim, self.text_encoder.config.d_model, size)

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        ids: torch.Tensor,
        padded_length: int = 512,
    ) -> torch.Tensor:
        """Predicted velocity.

        Args:
            noisy: [B, C, F, H, W] latents at noise level sigma.
            sigma: [B] in [0, 1].
            ids: int [B, L] token ids, padded with 0, with room for at least one pad.
            padded_length: to how many tokens the pipeline would pad, > L.

        Returns:
            [B, C, F, H, W].
        """
        mask = (ids != 0).long()
        embeds = encode_text(self.text_encoder, ids)
        with_training_attention(self.transformer, padding_bias(mask, padded_length, embeds.dtype))
        return self.transformer(noisy, sigma * 1000, embeds, return_dict=False)[0]


class FoldedPaddingProcessor(WanAttnProcessor):
    """The stock processor, with a bias on the text keys that stands for the padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: torch.Tensor | None = None

    def __call__(  # type: ignore[override]
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def build_transformer(z_dim: int, text_dim: int, size: DenoiserSize) -> WanTransformer3DModel:
    """A fresh transformer over latents of z_dim channels."""
    transformer = WanTransformer3DModel(
        patch_size=(1, size.patch, size.patch),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=z_dim,
        out_channels=z_dim,
        text_dim=text_dim,
        freq_dim=64,
        ffn_dim=size.ffn,
        num_layers=size.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def padding_bias(mask: torch.Tensor, padded_length: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the logits so that the few pads kept weigh as all of them: [B, 1, 1, L] for mask [B, L].

    Raises:
        GenAttnError: where a row keeps no pad although the pipeline would have some.
    """
    kept = mask.shape[1] - mask.sum(1)
    if padded_length < mask.shape[1] or bool((kept < 1).any()):
        raise GenAttnError(
            f"each row of ids must keep one pad and be no longer than padded_length, got {mask.shape[1]} ids with "
            f"{int(kept.min())} pads for {padded_length}; pad the ids further"
        )
    left_out = ((padded_length - mask.sum(1)) / kept).log()
    return torch.where(mask.bool(), 0.0, left_out[:, None]).to(dtype)[:, None, None, :]


def with_training_attention(transformer: WanTransformer3DModel, bias: torch.Tensor | None) -> None:
    """Set the padding bias, in place; the first call swaps the processors of the text attention in."""
    blocks: Any = transformer.blocks
    for block in blocks:
        if not isinstance(block.attn2.processor, FoldedPaddingProcessor):
            block.attn2.set_processor(FoldedPaddingProcessor())
        block.attn2.processor.bias = bias


def sample_sigma(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [B] in (0, 1): logit-normal, shifted as the pipeline's scheduler shifts."""
    sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    return FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)


def flow_loss(
    model: TinyDenoiser,
    latents: torch.Tensor,
    ids: torch.Tensor,
    empty_ids: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity at random noise levels, a tenth of the captions dropped.

    Cells on and beside objects weigh more (`object_weight`): they are a tenth of a clip, and all that a caption is about.

    Args:
        model: the denoiser.
        latents: normalised, with their channels of place, [B, C, F, H, W].
        ids: int [B, L] tokens of the captions.
        empty_ids: int [L] tokens of the empty caption.
        generator: CPU generator.
    """
    batch, device = len(latents), latents.device
    sigma = sample_sigma(batch, generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    drop = (torch.rand(batch, generator=generator) < CAPTION_DROPOUT).to(device)
    ids = torch.where(drop[:, None], empty_ids.to(device), ids.to(device))
    length = PADDED_LENGTHS[int(torch.randint(len(PADDED_LENGTHS), (1,), generator=generator))]
    level = sigma.view(-1, 1, 1, 1, 1)
    predicted = model((1 - level) * latents + level * noise, sigma, ids, length)
    return ((predicted.float() - (noise - latents)).square() * loss_weight(latents)).mean()


def count_parameters(model: nn.Module) -> int:
    """Number of weights, for a model card."""
    return sum(math.prod(p.shape) for p in model.parameters())
