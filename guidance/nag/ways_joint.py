"""The text's way through models whose text and image share one attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genattn.guidance.nag import sequences
from genattn.guidance.nag.streams import (
    Stream,
    TextWay,
    apart,
    at_end,
    inside,
    merged,
    rows,
    text_part,
    text_rows,
    turned,
)

Inputs = Mapping[str, Any]
_HIDDEN, _TEXT = "hidden_states", "encoder_hidden_states"
_MASKED = ("encoder_hidden_states", "encoder_attention_mask")
_FLUX_IDS = ("encoder_hidden_states", "txt_ids")
_HUNYUAN_STREAMS = (
    apart("transformer_blocks", _HIDDEN, _TEXT, attention_mask=rows(-1)),
    apart("single_transformer_blocks", _HIDDEN, _TEXT, attention_mask=rows(-1)),
)
_HUNYUAN = TextWay(_HUNYUAN_STREAMS, _MASKED)
_FLUX = TextWay(
    (
        apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
        apart("single_transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
    ),
    _FLUX_IDS,
)
_TEXT_FIRST = TextWay((apart("transformer_blocks", _HIDDEN, _TEXT, text_first=True),))
_FIBO_MASK = {"image_rotary_emb": rows(0), "joint_attention_kwargs": inside("attention_mask", rows(-1))}


def _kept_keys(model: Any, told: Inputs) -> str:
    """FLUX.2's branch that keeps the keys of its reference images."""
    if told.get("kv_cache_mode") is None:
        return ""
    return (
        "keys of its reference images are kept (kv_cache_mode is set); use the pipeline that runs its references in every step"
    )


def _llama_tokens(inputs: Inputs) -> int:
    return int(inputs["encoder_hidden_states_llama3"].shape[2])


def _z_image_tokens(model: Any, inputs: Inputs) -> int:
    patch, along = inputs.get("patch_size") or 2, inputs.get("f_patch_size") or 1
    frames, height, width = inputs["x"][0].shape[1:]
    tokens = (frames // along) * (height // patch) * (width // patch)
    return int(tokens + -tokens % 32)


def _lumina_tokens(model: Any, inputs: Inputs) -> int:
    patch = model.config.patch_size
    return int((inputs["hidden_states"].shape[-2] // patch) * (inputs["hidden_states"].shape[-1] // patch))


def _packed_tokens(model: Any, inputs: Inputs) -> int:
    return int(inputs["hidden_states"].shape[1])


WAYS: dict[str, TextWay] = {
    "SD3Transformer2DModel": TextWay((apart("transformer_blocks", _TEXT, _HIDDEN),)),
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
            apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0)),
            merged("single_transformer_blocks", text_first=True, image_rotary_emb=rows(0)),
        ),
        _FLUX_IDS,
        refuses=_kept_keys,
    ),
    "Flux3Transformer2DModel": TextWay(
        (
            apart(
                "single_transformer_blocks",
                _TEXT,
                _HIDDEN,
                text_first=True,
                image_rotary_emb=rows(0),
                temb_mod_context=text_rows(1),
            ),
        ),
        _FLUX_IDS,
        passed={"mode_blocks.image": "hidden_states", "mode_blocks.image_cond": "hidden_states"},
    ),
    "ChromaTransformer2DModel": TextWay(
        (
            apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, image_rotary_emb=rows(0), attention_mask=rows(-1)),
            merged("single_transformer_blocks", text_first=True, image_rotary_emb=rows(0), attention_mask=rows(-1)),
        ),
        (*_FLUX_IDS, "attention_mask"),
    ),
    "BriaFiboTransformer2DModel": TextWay(
        (
            replace(apart("transformer_blocks", _TEXT, _HIDDEN, text_first=True, **_FIBO_MASK), renewed=sequences.halves),
            replace(merged("single_transformer_blocks", "hidden_states", True, **_FIBO_MASK), renewed=sequences.halves),
        ),
        (*_FLUX_IDS, "text_encoder_layers"),
        prepare=sequences.bria_fibo,
    ),
    "QwenImageTransformer2DModel": TextWay(
        (
            apart(
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
        (merged("layers", "x", attn_mask=rows(-1), freqs_cis=turned),),
        ("cap_feats",),
        passed={"noise_refiner": "x"},
        image_tokens=_z_image_tokens,
    ),
    "HiDreamImageTransformer2DModel": TextWay(
        (
            apart("double_stream_blocks", _HIDDEN, _TEXT, image_rotary_emb=rows(1)),
            merged("single_stream_blocks", image_rotary_emb=rows(1), hidden_states_masks=rows(-1)),
        ),
        ("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        fresh=_llama_tokens,
    ),
    "Lumina2Transformer2DModel": TextWay(
        (merged("layers", text_first=True, attention_mask=rows(-1), image_rotary_emb=turned),),
        _MASKED,
        passed={"noise_refiner": "hidden_states"},
        image_tokens=_lumina_tokens,
    ),
    "Krea2Transformer2DModel": TextWay(
        (merged("transformer_blocks", text_first=True, attention_mask=rows(-1), image_rotary_emb=rows(0)),),
        _MASKED,
        image_tokens=_packed_tokens,
        prepare=sequences.krea2,
    ),
    "AuraFlowTransformer2DModel": TextWay(
        (
            apart("joint_transformer_blocks", _TEXT, _HIDDEN, text_first=True),
            merged("single_transformer_blocks", text_first=True),
        )
    ),
    "CogView3PlusTransformer2DModel": _TEXT_FIRST,
    "CogView4Transformer2DModel": TextWay(
        (apart("transformer_blocks", _HIDDEN, _TEXT, text_first=True, attention_mask=at_end),),
        ("encoder_hidden_states", "attention_mask"),
    ),
    "JoyImageEditTransformer3DModel": TextWay((apart("double_blocks", _HIDDEN, _TEXT),)),
    "JoyImageEditPlusTransformer3DModel": TextWay(
        (apart("double_blocks", _HIDDEN, _TEXT, attention_mask=rows(-1)),),
        ("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "HunyuanImageTransformer2DModel": TextWay(
        _HUNYUAN_STREAMS, (*_MASKED, "encoder_hidden_states_2", "encoder_attention_mask_2")
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": TextWay(
        (apart("transformer_blocks", _HIDDEN, _TEXT, attention_mask=at_end),),
        (*_MASKED, "encoder_hidden_states_2", "encoder_attention_mask_2"),
    ),
    "MochiTransformer3DModel": TextWay(
        (Stream("transformer_blocks", (_HIDDEN, _TEXT), extend={"encoder_attention_mask": at_end}, one_by_one=True),), _MASKED
    ),
    "CogVideoXTransformer3DModel": _TEXT_FIRST,
    "ConsisIDTransformer3DModel": _TEXT_FIRST,
    "EasyAnimateTransformer3DModel": TextWay(
        (apart("transformer_blocks", _HIDDEN, _TEXT, text_first=True),),
        ("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    "MiniMaxH3Transformer3DModel": TextWay(
        (merged("transformer_blocks", text_first=True, rotary_emb=rows(0), adaln_indices=rows(0), attention_mask=rows(-1)),),
        image_tokens=sequences.minimax_h3_image,
        prepare=sequences.minimax_h3,
        refuses=sequences.minimax_h3_refuses,
    ),
}
