"""Autoencoders with random weights for the tiny pipelines."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)


def image_vae(latent_channels: int, **settings: Any) -> Any:
    """No spatial compression, for the image transformers."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 1, "sample_size": 32, **settings}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035}
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=latent_channels, **shape, **plain).eval()


def unet_vae() -> Any:
    """Halves each side, for the UNets."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    return AutoencoderKL(in_channels=3, out_channels=3, **blocks, **shape).eval()


def wan_vae() -> Any:
    """8 x 8 x 4."""
    torch.manual_seed(0)
    downsample = [False, True, True]
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=downsample)
    return vae.eval()


def hunyuan_vae() -> Any:
    """8 x 8 x 4."""
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()


def cogvideox_vae() -> Any:
    """8 x 8 x 4."""
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def ltx_vae() -> Any:
    """4 x 4 x 4, frames decoded together."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def mochi_vae() -> Any:
    """8 x 8 x 6."""
    torch.manual_seed(0)
    layers = {"layers_per_block": (1,) * 5, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return AutoencoderKLMochi(latent_channels=12, out_channels=3, **layers).eval()


def qwen_vae() -> Any:
    """4 x 4."""
    torch.manual_seed(0)
    shape = {"base_dim": 3, "z_dim": 4, "dim_mult": [1] * 3, "num_res_blocks": 1, "temperal_downsample": [False, True]}
    return diffusers.AutoencoderKLQwenImage(**shape, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def minimax_h3_vae() -> Any:
    """4 x 4 in space; in time 17 n + 5 frames are 5 n + 2 latents, as in the released one."""
    torch.manual_seed(0)
    shape = {"latent_channels": 4, "block_out_channels": (4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    factors = {"spatial_downsample_factors": (1, 2, 2), "temporal_downsample_factors": (1, 2, 2)}
    decoder = {"decoder_num_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16}
    scale = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    return diffusers.AutoencoderKLMiniMaxH3(**shape, **factors, **decoder, **scale).eval()


def minimax_h3_audio_vae() -> Any:
    """Four samples a latent, 40 latents a second."""
    torch.manual_seed(0)
    encoder = {"encoder_dim": 4, "encoder_rates": (2, 2), "latent_dim": 24, "latent_channels": 6, "num_attention_heads": 2}
    decoder = {"decoder_dim": 8, "decoder_rates": (2, 2), "decoder_kernel_sizes": (4, 4)}
    blocks = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3, 5),), "sampling_rate": 160}
    scale = {"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
    return diffusers.AutoencoderKLMiniMaxH3Audio(**encoder, **decoder, **blocks, **scale).eval()
