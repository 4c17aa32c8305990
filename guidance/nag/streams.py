"""How text goes through the blocks of every family: which arguments hold it, and in which order the attention sees it.

    apart     text and image are two arguments: SD3, FLUX, Qwen-Image, HunyuanVideo, CogVideoX, Mochi ...
    merged    they are one sequence: single-stream blocks of FLUX.2, Chroma, AuraFlow, HiDream; Lumina 2, Z-Image
    cross     the image asks the text, which no block changes: Wan, LTX, PixArt, Cosmos, UNets ...

The negative text is put into the same arguments behind the positive one, so stock blocks carry it along.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from genattn.guidance.nag.cut import Cut

Extend = Callable[[Any, Any, Cut], Any]


@dataclass(frozen=True)
class Stream:
    """One list of blocks.

    Attributes:
        stack: its name in the model; "" for the model itself, where the text passes the root unchanged.
        gives: the arguments that a block's results replace, in order; a single name when it gives a bare tensor.
        text: arguments with tokens of text, [B, T, C]; empty where the blocks have none.
        merged: the argument that holds text and image in one sequence, "" where they come apart.
        text_first: whether the attention's sequence begins with the text; of no matter for cross-attention.
        cross: whether the text is only looked at.
        extend: further arguments that follow the text's length, and how.
        one_by_one: whether every sample is attended alone, with its valid tokens only.
    """

    stack: str
    gives: tuple[str, ...] | str
    text: tuple[str, ...] = ("encoder_hidden_states",)
    merged: str = ""
    text_first: bool = False
    cross: bool = False
    extend: Mapping[str, Extend] = field(default_factory=dict)
    one_by_one: bool = False


@dataclass(frozen=True)
class TextWay:
    """The way of the text through a denoiser.

    Attributes:
        streams: its lists of blocks, in the order of execution.
        inputs: what the denoiser is told of a text, by argument; the first holds the tokens.
        passed: lists of blocks that see no text and are left out when the negative text is prepared.
        fresh: how many tokens at the end of the text every block gets anew, read from the negative's inputs.
        image_tokens: of a merged sequence, read from the inputs, where no block before tells the length of the text.
    """

    streams: tuple[Stream, ...]
    inputs: tuple[str, ...] = ("encoder_hidden_states",)
    passed: Mapping[str, str] = field(default_factory=dict)
    fresh: Callable[[Mapping[str, Any]], int] = lambda inputs: 0
    image_tokens: Callable[[Any, Mapping[str, Any]], int] | None = None


# ---- how an argument follows


def at_end(mine: Any, theirs: Any, cut: Cut) -> Any:
    """A mask over the text, its last axis as long as the text; None where nothing is masked."""
    if mine is None and theirs is None:
        return None
    mine, theirs = _masks(mine, theirs, cut.text, cut.more)
    return torch.cat([mine, theirs.to(mine.dtype)], -1)


def rows(axis: int) -> Extend:
    """A tensor or a tuple of tensors with one entry per token of the whole sequence along `axis`."""

    def extend(mine: Any, theirs: Any, cut: Cut) -> Any:
        if isinstance(mine, tuple | list):
            return type(mine)(extend(a, b, cut) for a, b in zip(mine, theirs, strict=True))
        if mine is None and theirs is None:
            return None
        mine, theirs = _masks(mine, theirs, cut.length, cut.image + cut.more)
        return spliced(mine, theirs, cut, axis % mine.ndim)

    return extend


def turned(mine: torch.Tensor, theirs: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Rotary factors [B, S, C], complex, of models that number the image's tokens after the caption's.

    The negative caption may be of another length. Only distances count, so its tokens are moved by what its own image
    would stand apart from the one that is there.
    """
    image = cut.text if cut.text_first else 0
    own = cut.more if cut.text_first else 0
    moved = mine[:, image : image + 1] * theirs[:, own : own + 1].conj()
    return spliced(mine, theirs * moved, cut, 1)


def text_part(mine: tuple[Any, Any], theirs: tuple[Any, Any], cut: Cut) -> tuple[Any, Any]:
    """Qwen-Image's (image, text) rotary factors."""
    return mine[0], torch.cat([mine[1], theirs[1]], 0)


def spliced(mine: torch.Tensor, theirs: torch.Tensor, cut: Cut, axis: int) -> torch.Tensor:
    """The negative's entries put in where its tokens stand."""
    start = 0 if cut.text_first else theirs.shape[axis] - cut.more
    before, after = mine.narrow(axis, 0, cut.at), mine.narrow(axis, cut.at, mine.shape[axis] - cut.at)
    return torch.cat([before, theirs.narrow(axis, start, cut.more).to(mine.dtype), after], axis)


def _masks(mine: Any, theirs: Any, tokens: int, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks, where one of the two texts needed none."""
    some = mine if mine is not None else theirs
    missing = (*some.shape[:-1], own if mine is not None else tokens)
    # an additive mask hides nothing with 0, a boolean one with True
    neutral = some.new_full(missing, some.dtype == torch.bool)
    return (neutral if mine is None else mine), (neutral if theirs is None else theirs)


# ---- the families


def _apart(stack: str, *gives: str, text_first: bool = False, **extend: Extend) -> Stream:
    return Stream(stack, gives, text_first=text_first, extend=extend)


def _merged(stack: str, name: str = "hidden_states", text_first: bool = False, **extend: Extend) -> Stream:
    return Stream(stack, name, text=(), merged=name, text_first=text_first, extend=extend)


def _cross(stack: str, *gives: str, text: tuple[str, ...] = ("encoder_hidden_states",), **extend: Extend) -> Stream:
    return Stream(stack, gives or "hidden_states", text=text, cross=True, extend=extend)


_HIDDEN, _TEXT = "hidden_states", "encoder_hidden_states"
_MASKED = ("encoder_hidden_states", "encoder_attention_mask")
_FLUX_IDS = ("encoder_hidden_states", "txt_ids")
_HUNYUAN = TextWay(
    (
        _apart("transformer_blocks", _HIDDEN, _TEXT, attention_mask=rows(-1)),
        _apart("single_transformer_blocks", _HIDDEN, _TEXT, attention_mask=rows(-1)),
    ),
    _MASKED,
)
_FLUX = TextWay(
    (
        _apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
        _apart("single_transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
    ),
    _FLUX_IDS,
)
_COGVIDEOX = TextWay((_apart("transformer_blocks", _HIDDEN, _TEXT, text_first=True),))
_WAN = TextWay((_cross("blocks"),))
_BASIC = TextWay((_cross("transformer_blocks", encoder_attention_mask=at_end),), _MASKED)
_UNET = TextWay((_cross("", encoder_attention_mask=at_end),), ("encoder_hidden_states", "encoder_attention_mask"))


def _llama_tokens(inputs: Mapping[str, Any]) -> int:
    return int(inputs["encoder_hidden_states_llama3"].shape[2])


def _z_image_tokens(model: Any, inputs: Mapping[str, Any]) -> int:
    patch, along = inputs.get("patch_size") or 2, inputs.get("f_patch_size") or 1
    frames, height, width = inputs["x"][0].shape[1:]
    tokens = (frames // along) * (height // patch) * (width // patch)
    return int(tokens + -tokens % 32)


def _lumina_tokens(model: Any, inputs: Mapping[str, Any]) -> int:
    patch = model.config.patch_size
    return int((inputs["hidden_states"].shape[-2] // patch) * (inputs["hidden_states"].shape[-1] // patch))


WAYS: dict[str, TextWay] = {
    "SD3Transformer2DModel": TextWay((_apart("transformer_blocks", _TEXT, _HIDDEN),)),
    **dict.fromkeys(
        (
            "FluxTransformer2DModel",
            "BriaTransformer2DModel",
            "OvisImageTransformer2DModel",
            "LongCatImageTransformer2DModel",
        ),
        _FLUX,
    ),
    "Flux2Transformer2DModel": TextWay(
        (
            _apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
            _merged("single_transformer_blocks", text_first=True, image_rotary_emb=rows(0)),
        ),
        _FLUX_IDS,
    ),
    "ChromaTransformer2DModel": TextWay(
        (
            _apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0), attention_mask=rows(-1)),
            _merged("single_transformer_blocks", text_first=True, image_rotary_emb=rows(0), attention_mask=rows(-1)),
        ),
        (*_FLUX_IDS, "attention_mask"),
    ),
    "QwenImageTransformer2DModel": TextWay(
        (
            _apart(
                "transformer_blocks",
                _TEXT,
                _HIDDEN,
                text_first=True,
                image_rotary_emb=text_part,
                encoder_hidden_states_mask=at_end,
            ),
        ),
        ("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "ZImageTransformer2DModel": TextWay(
        (_merged("layers", "x", attn_mask=rows(-1), freqs_cis=turned),),
        ("cap_feats",),
        passed={"noise_refiner": "x"},
        image_tokens=_z_image_tokens,
    ),
    "HiDreamImageTransformer2DModel": TextWay(
        (
            _apart("double_stream_blocks", _HIDDEN, _TEXT, image_rotary_emb=rows(1)),
            _merged("single_stream_blocks", image_rotary_emb=rows(1), hidden_states_masks=rows(-1)),
        ),
        ("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        fresh=_llama_tokens,
    ),
    "Lumina2Transformer2DModel": TextWay(
        (_merged("layers", text_first=True, attention_mask=rows(-1), image_rotary_emb=turned),),
        _MASKED,
        passed={"noise_refiner": "hidden_states"},
        image_tokens=_lumina_tokens,
    ),
    "AuraFlowTransformer2DModel": TextWay(
        (
            _apart("joint_transformer_blocks", _TEXT, _HIDDEN, text_first=True),
            _merged("single_transformer_blocks", text_first=True),
        )
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": TextWay(
        (_apart("transformer_blocks", _HIDDEN, _TEXT, attention_mask=at_end),),
        (*_MASKED, "encoder_hidden_states_2", "encoder_attention_mask_2"),
    ),
    "MochiTransformer3DModel": TextWay(
        (Stream("transformer_blocks", (_HIDDEN, _TEXT), extend={"encoder_attention_mask": at_end}, one_by_one=True),), _MASKED
    ),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": _COGVIDEOX,
    "WanTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanVACETransformer3DModel": TextWay(
        (_cross("vace_blocks", "control_hidden_states", "control_hidden_states"), _cross("blocks"))
    ),
    "LTXVideoTransformer3DModel": _BASIC,
    "LTX2VideoTransformer3DModel": TextWay(
        (
            _cross(
                "transformer_blocks",
                "hidden_states",
                "audio_hidden_states",
                text=("encoder_hidden_states", "audio_encoder_hidden_states"),
                encoder_attention_mask=at_end,
                audio_encoder_attention_mask=at_end,
            ),
        ),
        (*_MASKED, "audio_encoder_hidden_states", "audio_encoder_attention_mask"),
    ),
    "PixArtTransformer2DModel": _BASIC,
    "SanaTransformer2DModel": _BASIC,
    "LatteTransformer3DModel": TextWay(
        (_cross("transformer_blocks", encoder_attention_mask=at_end),),
        passed={"temporal_transformer_blocks": "hidden_states"},
    ),
    "CosmosTransformer3DModel": TextWay(
        (_cross("transformer_blocks", attention_mask=at_end),), ("encoder_hidden_states", "attention_mask")
    ),
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
}


# families whose text NAG does not carry yet, and what stands in the way
NOT_CARRIED: dict[str, str] = {
    **dict.fromkeys(
        (
            "MiniMaxH3Transformer3DModel",
            "Cosmos3OmniTransformer",
            "QwenImage21Transformer2DModel",
            "OmniGenTransformer2DModel",
            "Ideogram4Transformer2DModel",
            "MiniMaxMusic3Transformer1DModel",
        ),
        "its text stands in a packed sequence that indices describe, and the indices would have to grow with it",
    ),
    **dict.fromkeys(
        (
            "AllegroTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
            "HeliosTransformer3DModel",
            "WanAnimate2Transformer3DModel",
            "SanaWMLTX2RefinerTransformer3DModel",
            "HunyuanDiT2DModel",
            "LuminaNextDiT2DModel",
            "Transformer2DModel",
            "DreamLiteTransformer2DModel",
            "Kandinsky5Transformer3DModel",
            "Kandinsky6Transformer3DModel",
            "AceStepTransformer1DModel",
            "StableAudioDiTModel",
            "StableAudio3DiTModel",
            "LongCatAudioDiTTransformer",
        ),
        "it asks its text by cross-attention of a form that was not written down here yet",
    ),
    **dict.fromkeys(
        (
            "Flux3Transformer2DModel",
            "Krea2Transformer2DModel",
            "ErnieImageTransformer2DModel",
            "NucleusMoEImageTransformer2DModel",
            "PRXTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "BriaFibo2Transformer2DModel",
            "HunyuanImageTransformer2DModel",
            "GlmImageTransformer2DModel",
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "EasyAnimateTransformer3DModel",
            "MotifVideoTransformer3DModel",
            "JoyImageEditTransformer3DModel",
            "JoyImageEditPlusTransformer3DModel",
        ),
        "its joint attention has a form that was not written down here yet",
    ),
    "DiTTransformer2DModel": "it is told a class, no text",
}


def way_of(model: Any) -> TextWay | None:
    """The text's way through a denoiser, by the name of its class or of a base class; None when it is not known."""
    return next((WAYS[base.__name__] for base in type(model).__mro__ if base.__name__ in WAYS), None)


def why_not_carried(model: Any) -> str:
    """Why NAG does not carry this denoiser's text; empty where nothing is known of it."""
    return next((NOT_CARRIED[base.__name__] for base in type(model).__mro__ if base.__name__ in NOT_CARRIED), "")


def register_way(model: str, way: TextWay) -> None:
    """Make NAG know a denoiser class of your own in this process, by the class's name."""
    WAYS[model] = way
