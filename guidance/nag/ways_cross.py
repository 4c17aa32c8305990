"""The text's way through models that ask it by cross-attention, or as further keys of the image's own attention."""

from collections.abc import Mapping
from typing import Any

import torch

from genattn.guidance.nag.streams import TextWay, at_end, cross, inside, keys, rows, text_part, text_rows, wan

Inputs = Mapping[str, Any]
_HIDDEN = "hidden_states"
_MASKED = ("encoder_hidden_states", "encoder_attention_mask")
_WAN = TextWay((wan("blocks"),))
_PLAIN = TextWay((cross("blocks"),))
_BASIC = TextWay((cross("transformer_blocks", encoder_attention_mask=at_end),), _MASKED)
_UNET = TextWay((cross("", encoder_attention_mask=at_end),), _MASKED)


def _rope_places(model: Any, told: Inputs, theirs: Inputs) -> dict[str, Any]:
    """Kandinsky 5 is told where its tokens of text stand: one behind the other."""
    tokens = theirs["encoder_hidden_states"].shape[1]
    return {"text_rope_pos": torch.arange(tokens, device=told["text_rope_pos"].device, dtype=told["text_rope_pos"].dtype)}


def _two_masks(model: Any, told: Inputs, theirs: Inputs) -> dict[str, Any]:
    """HunyuanDiT's masks, where they were not handed in: all is text."""
    found = {}
    for text, mask in (
        ("encoder_hidden_states", "text_embedding_mask"),
        ("encoder_hidden_states_t5", "text_embedding_mask_t5"),
    ):
        tokens = theirs.get(text, told[text])
        if mask not in theirs and text in theirs:
            found[mask] = told[mask].new_ones(tokens.shape[:2])
    return found


def _mean_of_text(model: Any, told: Inputs) -> str:
    if model.config.adaln_type == "local" and model.config.adaln_use_text_cond:
        return "its blocks are modulated by the mean of all text that they are given"
    return ""


WAYS: dict[str, TextWay] = {
    **dict.fromkeys(
        (
            "WanTransformer3DModel",
            "ChronoEditTransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "AnyFlowTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
        ),
        _WAN,
    ),
    "WanVACETransformer3DModel": TextWay((wan("vace_blocks", "control_hidden_states", "control_hidden_states"), wan("blocks"))),
    "WanAnimate2Transformer3DModel": _PLAIN,
    "HeliosTransformer3DModel": _PLAIN,
    **dict.fromkeys(
        (
            "LTXVideoTransformer3DModel",
            "SanaWMLTX2RefinerTransformer3DModel",
            "AllegroTransformer3DModel",
            "PixArtTransformer2DModel",
            "SanaTransformer2DModel",
            "Transformer2DModel",
            "DreamLiteTransformer2DModel",
            "StableAudioDiTModel",
        ),
        _BASIC,
    ),
    "LTX2VideoTransformer3DModel": TextWay(
        (
            cross(
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
    "LatteTransformer3DModel": TextWay(
        (cross("transformer_blocks", encoder_attention_mask=at_end),),
        passed={"temporal_transformer_blocks": "hidden_states"},
    ),
    "CosmosTransformer3DModel": TextWay(
        (cross("transformer_blocks", attention_mask=at_end),), ("encoder_hidden_states", "attention_mask")
    ),
    "Kandinsky5Transformer3DModel": TextWay(
        (cross("visual_transformer_blocks", "visual_embed", text=("text_embed",)),),
        ("encoder_hidden_states", "text_rope_pos"),
        prepare=_rope_places,
    ),
    "Kandinsky6Transformer3DModel": TextWay(
        (cross("visual_transformer_blocks", "vis", "aud", text=("text_v", "text_a"), attn_mask=at_end),), _MASKED
    ),
    "HunyuanDiT2DModel": TextWay(
        (cross("blocks"),),
        ("encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"),
        prepare=_two_masks,
    ),
    "LuminaNextDiT2DModel": TextWay((cross("layers", encoder_mask=at_end),), ("encoder_hidden_states", "encoder_mask")),
    "AceStepTransformer1DModel": TextWay((cross("layers"),)),
    "StableAudio3DiTModel": TextWay((cross("transformer_blocks", text=("context",), context_mask=at_end),), _MASKED),
    "LongCatAudioDiTTransformer": TextWay(
        (cross("blocks", text=("cond",), cond_mask=at_end, cond_rope=text_rows(0)),), _MASKED, refuses=_mean_of_text
    ),
    "PRXTransformer2DModel": TextWay(
        (keys("blocks", text_first=True, attention_mask=at_end),), ("encoder_hidden_states", "attention_mask")
    ),
    "NucleusMoEImageTransformer2DModel": TextWay(
        (
            keys(
                "transformer_blocks",
                text_first=False,
                image_rotary_emb=text_part,
                attention_kwargs=inside("attention_mask", rows(-1)),
            ),
        ),
        ("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
}
