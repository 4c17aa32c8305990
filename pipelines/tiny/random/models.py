"""Settings and inputs of the tiny denoisers; the sizes follow diffusers' own model tests, the grids are never square."""

import torch

from genattn.pipelines.tiny.random import (
    audios,
    images,
    images_by_ids,
    images_by_patches,
    videos,
    videos_more,
    videos_packed,
)
from genattn.pipelines.tiny.random.spec import TinyModel

MODELS: dict[str, TinyModel] = {
    "wan": TinyModel("WanTransformer3DModel", videos.WAN, videos.wan),
    "wan-i2v": TinyModel("WanTransformer3DModel", videos.WAN_I2V, videos.wan_i2v),
    "wan-ti2v": TinyModel("WanTransformer3DModel", videos.WAN, videos.wan_ti2v),
    "wan-vace": TinyModel("WanVACETransformer3DModel", videos.WAN_VACE, videos.wan_vace),
    "wan-animate": TinyModel("WanAnimateTransformer3DModel", videos.WAN_ANIMATE, videos.wan_animate, large=(21, 8, 6)),
    "skyreels": TinyModel("SkyReelsV2Transformer3DModel", videos.SKYREELS, videos.wan),
    "hunyuan-video": TinyModel("HunyuanVideoTransformer3DModel", videos.HUNYUAN, videos.hunyuan),
    "hunyuan-video-1.5": TinyModel("HunyuanVideo15Transformer3DModel", videos.HUNYUAN_15, videos.hunyuan_15),
    "framepack": TinyModel("HunyuanVideoFramepackTransformer3DModel", videos.FRAMEPACK, videos.framepack),
    "mochi": TinyModel("MochiTransformer3DModel", videos.MOCHI, videos.mochi, zero=("pos_frequencies",)),
    "cogvideox": TinyModel("CogVideoXTransformer3DModel", videos.COGVIDEOX, videos.cogvideox, axes="BFCHW"),
    "cogvideox-1.5": TinyModel("CogVideoXTransformer3DModel", videos.COGVIDEOX_15, videos.cogvideox_15, axes="BFCHW"),
    "ltx": TinyModel("LTXVideoTransformer3DModel", videos.LTX, videos.ltx, axes="BSC"),
    "ltx-condition": TinyModel("LTXVideoTransformer3DModel", videos.LTX, videos.ltx_condition, axes="BSC"),
    "ltx2": TinyModel("LTX2VideoTransformer3DModel", videos.LTX2, videos.ltx2, axes="BSC"),
    "cosmos": TinyModel("CosmosTransformer3DModel", videos.COSMOS, videos.cosmos),
    "latte": TinyModel("LatteTransformer3DModel", videos.LATTE, videos.latte, large=(4, 20, 20)),
    "animatediff": TinyModel("UNetMotionModel", images.ANIMATEDIFF, images.animatediff, latents="sample", large=(5, 32, 24)),
    "flux": TinyModel("FluxTransformer2DModel", images.FLUX, images.flux, axes="BSC", large=(32, 24)),
    "flux-kontext": TinyModel("FluxTransformer2DModel", images.FLUX, images.flux_kontext, axes="BSC", large=(32, 24)),
    "flux2": TinyModel("Flux2Transformer2DModel", images.FLUX2, images.flux2, axes="BSC", large=(32, 24)),
    "sd3": TinyModel("SD3Transformer2DModel", images.SD3, images.sd3, axes="BCHW", large=(32, 24)),
    "sd3.5": TinyModel("SD3Transformer2DModel", images.SD35, images.sd3, axes="BCHW", large=(32, 24)),
    "qwen-image": TinyModel("QwenImageTransformer2DModel", images.QWEN, images.qwen, axes="BSC", large=(32, 24)),
    "qwen-image-edit": TinyModel("QwenImageTransformer2DModel", images.QWEN, images.qwen_edit, axes="BSC", large=(32, 24)),
    "z-image": TinyModel(
        "ZImageTransformer2DModel", images.Z_IMAGE, images.z_image, latents="x", axes="[CFHW]", large=(32, 24)
    ),
    "hidream": TinyModel("HiDreamImageTransformer2DModel", images.HIDREAM, images.hidream, axes="BCHW", large=(16, 16)),
    "pixart": TinyModel("PixArtTransformer2DModel", images.PIXART, images.pixart, axes="BCHW", large=(32, 24)),
    "sana": TinyModel("SanaTransformer2DModel", images.SANA, images.sana, axes="BCHW", large=(32, 24)),
    "lumina2": TinyModel("Lumina2Transformer2DModel", images.LUMINA2, images.lumina2, axes="BCHW", large=(32, 24)),
    "aura-flow": TinyModel("AuraFlowTransformer2DModel", images.AURA_FLOW, images.aura_flow, axes="BCHW", large=(32, 24)),
    "chroma": TinyModel("ChromaTransformer2DModel", images.CHROMA, images.chroma, axes="BSC", large=(32, 24)),
    "unet": TinyModel("UNet2DConditionModel", images.UNET, images.unet, latents="sample", axes="BCHW", large=(32, 24)),
    "unet-xl": TinyModel("UNet2DConditionModel", images.UNET_XL, images.unet_xl, latents="sample", axes="BCHW", large=(32, 24)),
    **videos_packed.TINY,
    **videos_more.TINY,
    **images_by_ids.TINY,
    **images_by_patches.TINY,
    **audios.TINY,
}


def settle(model: torch.nn.Module, zero: tuple[str, ...], seed: int) -> None:
    """Give every parameter a finite value that counts.

    `zero` names parameters that stock code leaves uninitialised. Matrices that start at zero (AdaLN gates, motion modules'
    outputs) are filled with small noise: behind a zero no test would see what the attention did.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in zero:
                parameter.zero_()
            elif parameter.ndim > 1 and not bool(parameter.count_nonzero()):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
