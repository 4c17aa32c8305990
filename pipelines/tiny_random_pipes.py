"""Whole stock pipelines around the tiny denoisers, text encoders and VAEs included."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)

from genattn.pipelines import tiny_random_text as tiny_text

BuildModel = Callable[..., Any]
Built = tuple[Any, dict[str, Any]]


def _image_vae(latent_channels: int) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def wan(build: BuildModel) -> Built:
    """Wan 2.1 text to video: two-pass guidance."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = WanPipeline(
        transformer=build(),
        transformer_2=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=tiny_text.umt5_encoder(),
        tokenizer=tiny_text.t5_tokenizer(),
    )
    return pipe, _call(height=64, width=48, num_frames=9, guidance_scale=6.0, negative_prompt="bad")


def sd3(build: BuildModel) -> Built:
    """Stable Diffusion 3: guidance in one batch."""
    pipe = StableDiffusion3Pipeline(
        transformer=build(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(4),
        text_encoder=tiny_text.clip_encoder(projected=True),
        text_encoder_2=tiny_text.clip_encoder(projected=True),
        text_encoder_3=tiny_text.t5_encoder(),
        tokenizer=tiny_text.clip_tokenizer(),
        tokenizer_2=tiny_text.clip_tokenizer(),
        tokenizer_3=tiny_text.t5_tokenizer(),
    )
    return pipe, _call(height=16, width=12, guidance_scale=5.0)


def flux(build: BuildModel) -> Built:
    """FLUX.1: distilled guidance, one pass."""
    pipe = FluxPipeline(
        transformer=build(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(1),
        text_encoder=tiny_text.clip_encoder(),
        tokenizer=tiny_text.clip_tokenizer(),
        text_encoder_2=tiny_text.t5_encoder(),
        tokenizer_2=tiny_text.t5_tokenizer(),
    )
    return pipe, _call(height=16, width=24, guidance_scale=3.5)


def _call(**settings: Any) -> dict[str, Any]:
    common = {"prompt": "a cat", "num_inference_steps": 3, "max_sequence_length": 16, "output_type": "pt"}
    return {**common, **settings}


PIPELINES: dict[str, Callable[[BuildModel], Built]] = {"wan": wan, "sd3": sd3, "flux": flux}
