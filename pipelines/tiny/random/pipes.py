"""Whole stock pipelines around the tiny denoisers, text encoders and VAEs included."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, MotionAdapter

from genattn.pipelines.tiny.random import qwen_text, text as words, vaes as vaes
from genattn.pipelines.tiny.random.models import settle

BuildModel = Callable[..., Any]
Built = tuple[Any, dict[str, Any]]


def _call(**settings: Any) -> dict[str, Any]:
    common = {"prompt": "a cat", "num_inference_steps": 3, "max_sequence_length": 16, "output_type": "pt"}
    return {**common, **settings}


def _wan(build: BuildModel, **experts: Any) -> Any:
    return diffusers.WanPipeline(
        transformer=build("wan"),
        vae=vaes.wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=words.umt5_encoder(),
        tokenizer=words.t5_tokenizer(),
        **experts,
    )


def wan(build: BuildModel) -> Built:
    """Wan 2.1 text to video: guidance in two passes."""
    return _wan(build, transformer_2=None), _call(height=64, width=48, num_frames=9, guidance_scale=6.0, negative_prompt="bad")


def wan_experts(build: BuildModel) -> Built:
    """Wan 2.2: one expert for the noisy steps, one for the rest."""
    pipe = _wan(build, transformer_2=build("wan", seed=1), boundary_ratio=0.9)
    settings = {"height": 64, "width": 48, "num_frames": 9, "guidance_scale": 6.0, "negative_prompt": "bad"}
    return pipe, _call(**{**settings, "num_inference_steps": 4})


def sd3(build: BuildModel) -> Built:
    """Stable Diffusion 3: guidance in one batch."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=build(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(4),
        text_encoder=words.clip_encoder(projected=True),
        text_encoder_2=words.clip_encoder(projected=True),
        text_encoder_3=words.t5_encoder(),
        tokenizer=words.clip_tokenizer(),
        tokenizer_2=words.clip_tokenizer(),
        tokenizer_3=words.t5_tokenizer(),
    )
    return pipe, _call(height=16, width=12, guidance_scale=5.0)


def flux(build: BuildModel) -> Built:
    """FLUX.1: distilled guidance, one pass."""
    pipe = diffusers.FluxPipeline(
        transformer=build(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(1),
        text_encoder=words.clip_encoder(),
        tokenizer=words.clip_tokenizer(),
        text_encoder_2=words.t5_encoder(),
        tokenizer_2=words.t5_tokenizer(),
    )
    return pipe, _call(height=16, width=24, guidance_scale=3.5)


def qwen_image(build: BuildModel) -> Built:
    """Qwen-Image: true guidance in two passes, text read by a vision-language model."""
    pipe = diffusers.QwenImagePipeline(
        transformer=build(),
        vae=vaes.qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=qwen_text.qwen25_vl_encoder(),
        tokenizer=qwen_text.qwen_tokenizer(),
    )
    return pipe, _call(height=32, width=24, true_cfg_scale=4.0, negative_prompt="bad", max_sequence_length=256)


def hunyuan_video(build: BuildModel) -> Built:
    """HunyuanVideo: distilled guidance, one pass."""
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=build(),
        vae=vaes.hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=words.llama_encoder(),
        tokenizer=words.llama_tokenizer(),
        text_encoder_2=words.clip_encoder(8),
        tokenizer_2=words.clip_tokenizer(),
    )
    template = {"template": "{}", "crop_start": 0}
    return pipe, _call(height=64, width=48, num_frames=9, guidance_scale=4.5, prompt_template=template)


def cogvideox(build: BuildModel) -> Built:
    """CogVideoX: guidance in one batch, DDIM."""
    pipe = diffusers.CogVideoXPipeline(
        transformer=build(),
        vae=vaes.cogvideox_vae(),
        scheduler=DDIMScheduler(),
        text_encoder=words.t5_encoder(),
        tokenizer=words.t5_tokenizer(),
    )
    return pipe, _call(height=64, width=48, num_frames=9, guidance_scale=6.0, negative_prompt="")


def ltx(build: BuildModel) -> Built:
    """LTX: guidance in one batch."""
    pipe = diffusers.LTXPipeline(
        transformer=build(),
        vae=vaes.ltx_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=words.t5_encoder(),
        tokenizer=words.t5_tokenizer(),
    )
    return pipe, _call(height=32, width=32, num_frames=9, guidance_scale=3.0, negative_prompt="")


def mochi(build: BuildModel) -> Built:
    """Mochi: guidance in one batch, every sample attended alone."""
    pipe = diffusers.MochiPipeline(
        transformer=build(),
        vae=vaes.mochi_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=words.t5_encoder(),
        tokenizer=words.t5_tokenizer(),
    )
    return pipe, _call(height=64, width=48, num_frames=7, guidance_scale=4.5, negative_prompt="")


def unet(build: BuildModel) -> Built:
    """Stable Diffusion 1: guidance in one batch, DDIM."""
    pipe = diffusers.StableDiffusionPipeline(
        unet=build(),
        vae=vaes.unet_vae(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        text_encoder=words.clip_encoder(8),
        tokenizer=words.clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    kwargs = _call(height=32, width=24, guidance_scale=7.5)
    del kwargs["max_sequence_length"]
    return pipe, kwargs


def animatediff(build: BuildModel) -> Built:
    """AnimateDiff: an image UNet with a motion adapter."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8), "layers_per_block": 2}
    image = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        **widths,
    ).eval()
    motion = MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=2, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    pipe = diffusers.AnimateDiffPipeline(
        unet=image,
        motion_adapter=motion.eval(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False),
        vae=vaes.unet_vae(),
        text_encoder=words.clip_encoder(8, layers=5),
        tokenizer=words.clip_tokenizer(),
        feature_extractor=None,
        image_encoder=None,
    )
    settle(pipe.unet, (), 0)
    kwargs = _call(height=32, width=24, num_frames=4, guidance_scale=7.5)
    del kwargs["max_sequence_length"]
    return pipe, kwargs


PIPELINES: dict[str, Callable[[BuildModel], Built]] = {
    "wan": wan,
    "wan-experts": wan_experts,
    "sd3": sd3,
    "flux": flux,
    "qwen-image": qwen_image,
    "hunyuan-video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "mochi": mochi,
    "unet": unet,
    "animatediff": animatediff,
}
