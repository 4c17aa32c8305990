"""Which preset belongs to a denoiser: by its class, its layers and heads, and what else the pipeline holds."""

from collections.abc import Collection

from genattn.planning.model_preset import ModelPreset
from genattn.planning.presets import PRESETS

# class of the denoiser -> presets of that architecture
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("wan-1.3b", "wan-14b", "wan2.2-14b", "wan2.2-5b"),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video",),
    "CogVideoXTransformer3DModel": ("cogvideox-5b", "cogvideox-2b"),
    "MochiTransformer3DModel": ("mochi",),
    "LTXVideoTransformer3DModel": ("ltx-video",),
    "CosmosTransformer3DModel": ("cosmos-7b", "cosmos2.5-2b", "cosmos2.5-14b"),
    "FluxTransformer2DModel": ("flux-dev",),
    "MiniMaxH3Transformer3DModel": ("minimax-h3",),
    "LTX2VideoTransformer3DModel": ("ltx-2",),
    "HunyuanVideo15Transformer3DModel": ("hunyuan-video-1.5",),
    "SkyReelsV2Transformer3DModel": ("skyreels-v2-1.3b", "skyreels-v2-14b"),
    "Kandinsky5Transformer3DModel": ("kandinsky5-lite",),
    "QwenImageTransformer2DModel": ("qwen-image", "qwen-image-edit"),
    "Flux2Transformer2DModel": ("flux2-dev", "flux2-klein-4b"),
    "ZImageTransformer2DModel": ("z-image",),
    "Krea2Transformer2DModel": ("krea2",),
}


def recognise(name: str, heads: int, layers: int, components: Collection[str] = ()) -> ModelPreset | None:
    """The preset of a denoiser of class `name` with so many heads and layers, None where none is known.

    components: of the pipeline; a second expert tells Wan 2.2 from 2.1, whose dimensions are the same.
    """
    found = [PRESETS[p] for p in ARCHITECTURES.get(name, ()) if (PRESETS[p].heads, PRESETS[p].layers) == (heads, layers)]
    if len(found) > 1:
        two = "transformer_2" in components
        found = [p for p in found if p.name.startswith("wan2.2") == two] or found
    return found[0] if found else None
