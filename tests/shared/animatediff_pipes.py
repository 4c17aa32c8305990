"""Stock AnimateDiff pipelines of every kind at tiny size with random weights, built from nothing."""

from typing import Any

import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
)
from PIL import Image

from genattn.pipelines.tiny.random import text as tiny_text

WIDTHS = (8, 8, 16, 16)
SIZE = 16


def make_unet(widths: tuple[int, ...] = WIDTHS, **config: Any) -> UNet2DConditionModel:
    """A UNet with cross-attention on all levels but the lowest."""
    torch.manual_seed(0)
    crossed = len(widths) - 1
    return UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=1,
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        attention_head_dim=4,
        norm_num_groups=4,
        **{"cross_attention_dim": 32, **config},
    ).eval()


def make_adapter(widths: tuple[int, ...] = WIDTHS, **config: Any) -> MotionAdapter:
    """Motion modules for `make_unet`, one per layer."""
    torch.manual_seed(1)
    return MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
        **config,
    ).eval()


def make_vae() -> AutoencoderKL:
    """Eight pixels a latent would be slow: two levels, two pixels a latent."""
    torch.manual_seed(2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks).eval()


def make_control() -> ControlNetModel:
    """A ControlNet for `make_unet`."""
    torch.manual_seed(3)
    crossed = len(WIDTHS) - 1
    model = ControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 8),
    )
    return _fill(model)


def make_sparse_control() -> SparseControlNetModel:
    """SparseCtrl for `make_unet`, with motion modules of its own."""
    torch.manual_seed(4)
    crossed = len(WIDTHS) - 1
    model = SparseControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion",) * crossed + ("DownBlockMotion",),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=32,
        conditioning_channels=4,
        concat_conditioning_mask=True,
        use_simplified_condition_embedding=True,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
    )
    return _fill(model)


def _fill(model: Any) -> Any:
    """Weights for the layers that control networks leave at zero, so that they steer."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def parts() -> dict[str, Any]:
    """What all kinds share."""
    return {
        "unet": make_unet(),
        "motion_adapter": make_adapter(),
        "vae": make_vae(),
        "scheduler": DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        "text_encoder": tiny_text.clip_encoder(),
        "tokenizer": tiny_text.clip_tokenizer(),
    }


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 24), (10 * i, 60, 200 - 9 * i)) for i in range(count)]


def build(kind: str, frames: int = 16) -> tuple[Any, dict[str, Any]]:
    """(pipeline, keyword arguments for two guided steps at 32 x 24 pixels)."""
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent"}
    sized = {**call, "height": 24, "width": 32, "num_frames": frames}
    shared = parts()
    if kind == "sdxl":
        pipe, call = _sdxl(shared), sized
    elif kind == "controlnet":
        pipe = AnimateDiffControlNetPipeline(**shared, controlnet=make_control())
        call = {**sized, "conditioning_frames": pictures(frames)}
    elif kind == "sparsectrl":
        pipe = AnimateDiffSparseControlNetPipeline(**shared, controlnet=make_sparse_control())
        call = {**sized, "conditioning_frames": pictures(1), "controlnet_frame_indices": [0]}
    elif kind == "video2video":
        pipe = AnimateDiffVideoToVideoPipeline(**shared)
        call = {**call, "video": pictures(frames), "height": 24, "width": 32, "strength": 1.0}
    elif kind == "video2video-controlnet":
        pipe = AnimateDiffVideoToVideoControlNetPipeline(**shared, controlnet=make_control())
        frames_in = {"video": pictures(frames), "conditioning_frames": pictures(frames)}
        call = {**call, **frames_in, "height": 24, "width": 32, "strength": 1.0}
    elif kind == "pag":
        pipe = AnimateDiffPAGPipeline(**shared, feature_extractor=None, image_encoder=None)
        call = {**sized, "pag_scale": 3.0}
    else:
        pipe, call = AnimateDiffPipeline(**shared), sized
        if kind == "freenoise":
            pipe.enable_free_noise(context_length=4, context_stride=2)
        elif kind == "no-guidance":
            call["guidance_scale"] = 1.0
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def _sdxl(shared: dict[str, Any]) -> AnimateDiffSDXLPipeline:
    widths = WIDTHS[:3]
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    shared = {**shared, "unet": make_unet(widths, cross_attention_dim=64, **more)}
    shared["motion_adapter"] = make_adapter(widths, use_motion_mid_block=False)
    second = {"text_encoder_2": tiny_text.clip_encoder(projected=True), "tokenizer_2": tiny_text.clip_tokenizer()}
    return AnimateDiffSDXLPipeline(**shared, **second)


KINDS = (
    "plain",
    "no-guidance",
    "sdxl",
    "controlnet",
    "sparsectrl",
    "video2video",
    "video2video-controlnet",
    "pag",
    "freenoise",
)
