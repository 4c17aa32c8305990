"""Where the text goes in each family of ComfyUI, as far as a second text can go along: what NAG needs to know of a model.

cross   the blocks ask the text by cross-attention: a second text stands behind the first where the text comes in
unet    the same, but the text is lengthened at each cross-attention, through ComfyUI's `attn2_patch`
joint   text and picture share one attention: a second text goes through the blocks beside the first
"""

from dataclasses import dataclass
from typing import Any, Literal

from genattn.errors import GenAttnError


@dataclass(frozen=True)
class TextWay:
    """The text's way through one family.

    diffusers: the class that holds the same weights there; released strengths go by it. beside: inputs of the model that belong
    to its text. lengthened: those of them that must cover both texts while the blocks run.
    """

    kind: Literal["cross", "unet", "joint"]
    diffusers: str
    beside: tuple[str, ...] = ()
    lengthened: tuple[str, ...] = ()


_MASK = ("attention_mask",)

WAYS: dict[str, TextWay] = {
    "WanModel": TextWay("cross", "WanTransformer3DModel"),
    "LTXVModel": TextWay("cross", "LTXVideoTransformer3DModel", _MASK, _MASK),
    "MiniTrainDIT": TextWay("cross", "CosmosTransformer3DModel"),
    "UNetModel": TextWay("unet", "UNet2DConditionModel"),
    "Flux": TextWay("joint", "FluxTransformer2DModel", _MASK),
    "Chroma": TextWay("joint", "ChromaTransformer2DModel", _MASK),
    "HunyuanVideo": TextWay("joint", "HunyuanVideoTransformer3DModel", ("attention_mask", "txt_byt5")),
    "QwenImageTransformer2DModel": TextWay("joint", "QwenImageTransformer2DModel", _MASK, _MASK),
    "MMDiT": TextWay("joint", "SD3Transformer2DModel"),
}

# why a second text cannot go along; "" for families of which nothing is known
_WHY_NOT: dict[str, str] = {
    "NextDiT": "ComfyUI lets no node replace its blocks, and its picture is turned by the length of the prompt",
    "SingleStreamDiT": "ComfyUI lets no node replace its blocks",
    "Kandinsky5": "its text attends to itself, turned by its place, before the picture asks it",
    "MiniMaxH3Model": "text, sound and clip are packed into one sequence before its blocks",
    "MageFlowTransformer2DModel": "several pictures share one sequence with several texts",
}

FAMILIES = "Wan, LTX, Cosmos, SD 1.5, SDXL, FLUX, Chroma, HunyuanVideo, Qwen-Image and SD3"


def text_way_of(model: Any) -> TextWay:
    """The text's way through a diffusion model. Raises GenAttnError with the reason where a second text cannot go along."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in _WHY_NOT:
            raise GenAttnError(f"NAG needs a model in which a second text can go along, got {names[0]}: {_WHY_NOT[name]}")
        if name in WAYS:
            return WAYS[name]
    raise GenAttnError(f"NAG on ComfyUI's models serves {FAMILIES}, got {names[0]}; leave it out, or use a diffusers pipeline")


def text_stands_first(model: Any) -> bool:
    """Whether a joint attention has the text before the picture; older HunyuanVideo has it behind."""
    blocks = getattr(model, "double_blocks", None)
    return not (blocks is not None and len(blocks) and getattr(blocks[0], "flipped_img_txt", False))
