"""Tiny stock video pipelines with random weights, one per family that endless video serves, and what their clips are called
with."""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from genattn.pipelines.tiny.random import text as text
from genattn.pipelines.tiny.random.build import build_model
from genattn.pipelines.tiny.random.vaes import (
    cogvideox_vae as cog_vae,
    hunyuan_vae as hunyuan_vae,
    ltx_vae as ltx_vae,
    mochi_vae as mochi_vae,
    unet_vae as image_vae,
    wan_vae as wan_vae,
)

FLOW_EULER = {"shift": 5.0}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(two_experts: bool = False, scheduler: Any = None, **config: Any) -> Any:
    model = build_model("wan", **config)
    return quiet(
        diffusers.WanPipeline(
            transformer=model,
            transformer_2=build_model("wan", seed=1) if two_experts else None,
            boundary_ratio=0.8 if two_experts else None,
            vae=wan_vae(),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(**FLOW_EULER),
            text_encoder=text.umt5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def _without_ftfy(pipeline: Any) -> None:
    module = importlib.import_module(pipeline.__module__)
    if not hasattr(module, "ftfy"):
        # these stock pipelines clean prompts with ftfy and do not ask whether it is there
        module.ftfy = types.SimpleNamespace(fix_text=lambda words: words)


def wan_ti2v(scheduler: Any = None, **config: Any) -> Any:
    _without_ftfy(diffusers.WanImageToVideoPipeline)
    return quiet(
        diffusers.WanImageToVideoPipeline(
            transformer=build_model("wan", **config),
            vae=wan_vae(),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(**FLOW_EULER),
            text_encoder=text.umt5_encoder(),
            tokenizer=text.t5_tokenizer(),
            expand_timesteps=True,
        )
    )


def skyreels(**config: Any) -> Any:
    _without_ftfy(diffusers.SkyReelsV2DiffusionForcingPipeline)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    # without its corrector: the stock loop hands the scheduler a view of the latents and overwrites it in place, so the
    # corrector of
    # the second step reads a wrong last sample (diffusers 0.42); ours keeps it
    scheduler = diffusers.UniPCMultistepScheduler(**flow, disable_corrector=list(range(50)))
    return quiet(
        diffusers.SkyReelsV2DiffusionForcingPipeline(
            transformer=build_model("skyreels", **config),
            vae=wan_vae(),
            scheduler=scheduler,
            text_encoder=text.umt5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def ltx(**config: Any) -> Any:
    return quiet(
        diffusers.LTXPipeline(
            transformer=build_model("ltx", **config),
            vae=ltx_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
            text_encoder=text.t5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def ltx_image(**config: Any) -> Any:
    pipe = ltx(**config)
    return quiet(diffusers.LTXImageToVideoPipeline(**pipe.components))


def ltx2(**config: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
        decoder_causal=False,
    ).eval()
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        rope_double_precision=False,
    ).eval()
    pipe = diffusers.LTX2Pipeline(
        transformer=build_model("ltx2", **config),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        text_encoder=text.t5_encoder(16),
        tokenizer=text.t5_tokenizer(),
        connectors=connectors,
        audio_vae=None,
        vocoder=None,
    )
    pipe.tokenizer.model_max_length = 16
    return quiet(pipe)


def cosmos(**config: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCosmos(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    pipe = diffusers.CosmosTextToWorldPipeline(
        transformer=build_model("cosmos", text_embed_dim=32, max_size=(8, 32, 32), **config),
        vae=vae,
        scheduler=scheduler,
        text_encoder=text.t5_encoder(),
        tokenizer=text.t5_tokenizer(),
        safety_checker=_NoChecker(),
    )
    return quiet(pipe)


def cosmos25(**config: Any) -> Any:
    model = build_model("cosmos", in_channels=17, out_channels=16, text_embed_dim=32, extra_pos_embed_type=None, **config)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0, "use_karras_sigmas": True}
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        transformer=model,
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**flow, sigma_max=200.0, sigma_min=0.01),
        text_encoder=text.t5_encoder(),
        tokenizer=text.t5_tokenizer(),
        safety_checker=_NoChecker(),
    )
    pipe._get_prompt_embeds = functools.partial(_t5_embeds, pipe)
    return quiet(pipe)


def _t5_embeds(pipe: Any, prompt: list[str], max_sequence_length: int, device: Any, dtype: Any) -> torch.Tensor:
    """Stands where Qwen2.5-VL and its chat template would; what is tested begins behind it."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
    return pipe.text_encoder(ids).last_hidden_state


class _NoChecker:
    """Stands where the gated safety model would; nothing here looks at pictures."""

    def to(self, *_: Any) -> "_NoChecker":
        return self

    def check_text_safety(self, _: str) -> bool:
        return True


def animatediff(**config: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=2, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    pipe = diffusers.AnimateDiffPipeline(
        unet=unet.eval(),
        motion_adapter=adapter.eval(),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        vae=image_vae(),
        text_encoder=text.clip_encoder(8, layers=5),
        tokenizer=text.clip_tokenizer(),
        feature_extractor=None,
        image_encoder=None,
    )
    torch.manual_seed(1)
    # fresh motion modules answer zero; give every layer a voice
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Linear) and bool((module.weight == 0).all()):
            torch.nn.init.normal_(module.weight, std=0.2)
    return quiet(pipe)


def unet3d(**config: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    return quiet(
        diffusers.TextToVideoSDPipeline(
            unet=unet.eval(),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            vae=image_vae(),
            text_encoder=text.clip_encoder(8, layers=2),
            tokenizer=text.clip_tokenizer(),
        )
    )


def cogvideox(**config: Any) -> Any:
    return quiet(
        diffusers.CogVideoXPipeline(
            transformer=build_model("cogvideox", time_embed_dim=8, sample_width=4, sample_height=4, **config),
            vae=cog_vae(),
            scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
            text_encoder=text.t5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def latte(**config: Any) -> Any:
    model = build_model("latte", **{"caption_channels": 32, "sample_size": 8, "video_length": 3, **config})
    return quiet(
        diffusers.LattePipeline(
            transformer=model,
            vae=image_vae(),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            text_encoder=text.t5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def hunyuan(**config: Any) -> Any:
    return quiet(
        diffusers.HunyuanVideoPipeline(
            transformer=build_model("hunyuan-video", **config),
            vae=hunyuan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder=text.llama_encoder(),
            tokenizer=text.llama_tokenizer(),
            text_encoder_2=text.clip_encoder(8),
            tokenizer_2=text.clip_tokenizer(),
        )
    )


def hunyuan15(**config: Any) -> Any:
    from transformers import ByT5Tokenizer

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=build_model("hunyuan-video-1.5", in_channels=9, text_embed_dim=32, **config),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=text.t5_encoder(),
        tokenizer=text.t5_tokenizer(),
        text_encoder_2=text.t5_encoder(8),
        tokenizer_2=ByT5Tokenizer(),
        guider=diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe._get_mllm_prompt_embeds = _t5_embeds_and_mask
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 3, 12
    return quiet(pipe)


def _t5_embeds_and_mask(tokenizer: Any, text_encoder: Any, prompt: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands where Qwen2.5-VL and its chat template would; what is tested begins behind it."""
    read = tokenizer([prompt] if isinstance(prompt, str) else prompt, padding="max_length", max_length=16, return_tensors="pt")
    return text_encoder(read.input_ids).last_hidden_state, read.attention_mask


def mochi(**config: Any) -> Any:
    return quiet(
        diffusers.MochiPipeline(
            transformer=build_model("mochi", **config),
            vae=mochi_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            text_encoder=text.t5_encoder(),
            tokenizer=text.t5_tokenizer(),
        )
    )


def kandinsky(**config: Any) -> Any:
    _without_ftfy(diffusers.Kandinsky5T2VPipeline)
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=build_model("kandinsky5", in_text_dim=32, **config),
        vae=hunyuan_vae(),
        text_encoder=text.t5_encoder(),
        tokenizer=text.t5_tokenizer(),
        text_encoder_2=text.clip_encoder(8),
        tokenizer_2=text.clip_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe._encode_prompt_qwen = functools.partial(_t5_embeds_and_lengths, pipe)
    return quiet(pipe)


def _t5_embeds_and_lengths(pipe: Any, prompt: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands where Qwen2.5-VL and its template would: a prompt's own length, no padding."""
    read = pipe.tokenizer(prompt, return_tensors="pt")
    return pipe.text_encoder(read.input_ids).last_hidden_state, torch.tensor([0, read.input_ids.shape[1]], dtype=torch.int32)


# family -> builder, height and width, frames of a clip of three latents, extra arguments of the stock call
FAMILIES: dict[str, tuple[Callable[..., Any], int, int, dict[str, Any]]] = {
    "Wan": (wan, 32, 9, {"max_sequence_length": 512}),
    "Wan TI2V": (wan_ti2v, 32, 9, {"max_sequence_length": 512}),
    "SkyReels-V2": (skyreels, 32, 9, {"ar_step": 0, "max_sequence_length": 512}),
    "LTX-Video": (ltx, 32, 9, {"max_sequence_length": 128}),
    "LTX-Video image to video": (ltx_image, 32, 9, {"max_sequence_length": 128}),
    "LTX-2": (ltx2, 32, 9, {"max_sequence_length": 16}),
    "Cosmos": (cosmos, 32, 9, {"max_sequence_length": 512}),
    "Cosmos 2.5": (cosmos25, 32, 9, {"max_sequence_length": 512}),
    "AnimateDiff": (animatediff, 16, 3, {}),
    "UNet3D": (unet3d, 16, 3, {}),
    "CogVideoX": (cogvideox, 32, 9, {"max_sequence_length": 16}),
    "Latte": (latte, 16, 3, {}),
    "HunyuanVideo": (hunyuan, 32, 9, {}),
    "HunyuanVideo-1.5": (hunyuan15, 16, 9, {}),
    "Mochi": (mochi, 32, 13, {"max_sequence_length": 16}),
    "Kandinsky 5": (kandinsky, 32, 9, {}),
}
