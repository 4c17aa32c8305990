"""Shapes of the models people run in 2026, each from a config that diffusers itself gives.

"defaults" are those of the class's constructor, which are the released checkpoint's where its documentation says so;
"convert_*" are the scripts in diffusers' repository that write the released configs. Sizes, frames and steps are the
pipeline's own defaults. Nothing here was measured: no attention settings are published for these, so the Radial ones are ours
and the paper's, carried over.
"""

from genattn.planning.model_preset import ModelPreset

_FOUR_EIGHT = (4, 8, 8)
_IMAGE = (1, 8, 8)


def _gated(inner: int) -> int:
    """Inner width of a feed-forward of two matrices that does the arithmetic of a gated one of three."""
    return inner * 3 // 2


PUBLISHED: tuple[ModelPreset, ...] = (
    ModelPreset(
        "minimax-h3", 56, 128, 50, _gated(14336), (4, 16, 16), joint_tokens=640, text_first=True, passes=1,
        size=(768, 1344), frames=124, width=5376, clips=(17, 5, 5, 2),
        source="defaults of MiniMaxH3Transformer3DModel and its modular blocks; 226 tokens of prompt and 5 s of sound",
    ),
    ModelPreset(
        "ltx-2", 32, 128, 48, 16384, (8, 32, 32), (1, 1, 1), cross_tokens=1024, steps=30, size=(512, 768), frames=121,
        source="defaults of LTX2VideoTransformer3DModel (the video stream alone) and LTX2Pipeline; "
        "convert_ltx2_to_diffusers.py has the same for 2.3 and 2.5",
    ),
    ModelPreset(
        "hunyuan-video-1.5", 16, 128, 54, 8192, (4, 16, 16), (1, 1, 1), joint_tokens=1256, size=(480, 832), frames=121,
        source="defaults of HunyuanVideo15Transformer3DModel, AutoencoderKLHunyuanVideo15 and HunyuanVideo15Pipeline",
    ),
    ModelPreset(
        "skyreels-v2-1.3b", 12, 128, 30, 8960, _FOUR_EIGHT, cross_tokens=512, size=(544, 960), frames=97,
        source="convert_skyreelsv2_to_diffusers.py, DF-1.3B-540P; defaults of SkyReelsV2Pipeline",
    ),
    ModelPreset(
        "skyreels-v2-14b", 40, 128, 40, 13824, _FOUR_EIGHT, cross_tokens=512, size=(720, 1280), frames=121,
        source="convert_skyreelsv2_to_diffusers.py, T2V-14B-720P",
    ),
    ModelPreset(
        "kandinsky5-lite", 32, 64, 32, 5120, _FOUR_EIGHT, cross_tokens=512, size=(512, 768), frames=121,
        source="defaults of Kandinsky5Transformer3DModel and Kandinsky5T2VPipeline",
    ),
    ModelPreset(
        "cosmos2.5-2b", 16, 128, 28, 8192, _FOUR_EIGHT, cross_tokens=512, steps=36, size=(704, 1280), frames=93,
        source="convert_cosmos_to_diffusers.py, Cosmos-2.5-Predict-Base-2B; defaults of Cosmos2_5_PredictBasePipeline",
    ),
    ModelPreset(
        "cosmos2.5-14b", 40, 128, 36, 20480, _FOUR_EIGHT, cross_tokens=512, steps=36, size=(704, 1280), frames=93,
        source="convert_cosmos_to_diffusers.py, Cosmos-2.5-Predict-Base-14B; defaults of Cosmos2_5_PredictBasePipeline",
    ),
    ModelPreset(
        "qwen-image", 24, 128, 60, 12288, _IMAGE, joint_tokens=512, text_first=True, size=(1024, 1024), frames=1,
        source="defaults of QwenImageTransformer2DModel and QwenImagePipeline",
    ),
    ModelPreset(
        "qwen-image-edit", 24, 128, 60, 12288, _IMAGE, joint_tokens=512 + 4096, text_first=True, size=(1024, 1024), frames=1,
        source="as qwen-image, one reference of the same size",
    ),
    ModelPreset(
        "flux2-dev", 48, 128, 56, _gated(18432), _IMAGE, joint_tokens=512, text_first=True, passes=1, size=(1024, 1024),
        frames=1, source="defaults of Flux2Transformer2DModel and Flux2Pipeline; convert_flux2_to_diffusers.py, flux2-dev",
    ),
    ModelPreset(
        "flux2-klein-4b", 24, 128, 25, _gated(9216), _IMAGE, joint_tokens=512, text_first=True, size=(1024, 1024), frames=1,
        source="convert_flux2_to_diffusers.py, klein of 5 + 20 blocks",
    ),
    ModelPreset(
        "z-image", 30, 128, 30, _gated(10240), _IMAGE, joint_tokens=512, size=(1024, 1024), frames=1,
        source="defaults of ZImageTransformer2DModel and ZImagePipeline",
    ),
    ModelPreset(
        "krea2", 48, 128, 28, _gated(16384), _IMAGE, joint_tokens=512, text_first=True, steps=28, size=(1024, 1024), frames=1,
        kv_heads=12, source="defaults of Krea2Transformer2DModel and Krea2Pipeline",
    ),
)  # fmt: skip
