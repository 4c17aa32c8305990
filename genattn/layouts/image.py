"""Image transformers that cut [B, C, H, W] into patches themselves."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout, references, refuse_mixed, refuse_mixed_rows, registers, text

Inputs = Mapping[str, Any]


def image_only(model: Any, inputs: Inputs) -> TokenLayout:
    """PixArt, Sana: patches of [B, C, H, W]; text by cross-attention."""
    return layout(_patches(model, inputs["hidden_states"]))


def image_then_text(model: Any, inputs: Inputs) -> TokenLayout:
    """SD3: patches of [B, C, H, W], then text."""
    return layout(_patches(model, inputs["hidden_states"]), text(inputs["encoder_hidden_states"].shape[1]))


def text_then_image(model: Any, inputs: Inputs) -> TokenLayout:
    """CogView3-Plus, CogView4: text, then patches of [B, C, H, W]. PRX: the same, the text as keys alone."""
    return layout(text(inputs["encoder_hidden_states"].shape[1]), _patches(model, inputs["hidden_states"]))


def glm_image(model: Any, inputs: Inputs) -> TokenLayout:
    """As CogView4; while an image is edited, the tokens of the condition images are keys in front of everything."""
    kept = _kept_keys(inputs.get("kv_caches"))
    words, image = text(inputs["encoder_hidden_states"].shape[1]), _patches(model, inputs["hidden_states"])
    return layout(references((kept,)) if kept else [], words, image)


def _kept_keys(caches: Any) -> int:
    """Tokens that GLM-Image's first layer adds to its keys."""
    first = caches[0] if caches is not None else None
    return first.k_caches[0].shape[1] if first is not None and first.mode == "read" and first.k_caches else 0


def hunyuan_image(model: Any, inputs: Inputs) -> TokenLayout:
    """Patches of [B, C, H, W] or [B, C, F, H, W], then both texts, the valid tokens of both before their padding."""
    shape = [n // p for n, p in zip(inputs["hidden_states"].shape[2:], model.config.patch_size)]
    second = inputs.get("encoder_hidden_states_2") if model.context_embedder_2 is not None else None
    words = inputs["encoder_hidden_states"].shape[1] + (0 if second is None else second.shape[1])
    return layout(grid(*shape), text(words))


def omnigen(model: Any, inputs: Inputs) -> TokenLayout:
    """Words with input images among them, one token of time, then the image."""
    words = inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else 0
    return layout(text(words), registers(1), _patches(model, inputs["hidden_states"]))


def bria_fibo2(model: Any, inputs: Inputs) -> TokenLayout:
    """The shortened text before image and context images, or behind them where the samples' texts are not of one length."""
    config, latents = model.config, inputs["hidden_states"]
    mask, given = inputs.get("encoder_attention_mask"), inputs.get("context_latents") or []
    lengths = [inputs["encoder_hidden_states"].shape[2]] * len(latents) if mask is None else mask.sum(dim=1).tolist()
    gists = [_gist_tokens(float(n), config) for n in lengths]
    images = [grid(*_patch_shape(model, latents)), references(*(_patch_shape(model, each) for each in given))]
    words = text(max(gists))
    return layout(words, *images) if min(gists) == max(gists) else layout(*images, words)


def _gist_tokens(words: float, config: Any) -> int:
    """Tokens to which FIBO 2's perceiver shortens a text of so many words."""
    span = config.gist_max_text_len - config.gist_min_text_len
    ratio = min(1.0, max(0.0, (words - config.gist_min_text_len) / span))
    raw = config.min_num_gist_tokens + ratio * (config.max_num_gist_tokens - config.min_num_gist_tokens)
    steps = math.ceil(raw / config.gist_step) * config.gist_step
    return int(max(config.min_num_gist_tokens, min(config.max_num_gist_tokens, steps)))


def joy_image(model: Any, inputs: Inputs) -> TokenLayout:
    """[B, items, C, F, H, W]: the last item, which is made, comes first; the others are references; then text."""
    latents = inputs["hidden_states"]
    along, high, wide = model.config.patch_size
    frames, height, width = latents.shape[-3:]
    shape = (frames // along, height // high, width // wide)
    others = references(*[shape] * (latents.shape[1] - 1 if latents.ndim == 6 else 0))
    return layout(grid(*shape), others, text(inputs["encoder_hidden_states"].shape[1]))


def feature_map(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Transformer2DModel, DreamLite: every place of [B, C, H, W] is a token, or every patch; class tokens have no places."""
    latents = inputs["hidden_states"]
    if latents.ndim != 4:
        return None
    patch = getattr(model.config, "patch_size", None) or 1
    return layout(grid(latents.shape[-2] // patch, latents.shape[-1] // patch))


def z_image(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Image, then caption, each filled up to a multiple of 32 with learned tokens that are attended to."""
    image, captions = inputs["x"], inputs["cap_feats"]
    if not isinstance(image[0], torch.Tensor) or not isinstance(captions[0], torch.Tensor):
        return None  # the omni model has several images in a sample
    refuse_mixed([sample.shape for sample in image])
    patch, along = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    frames, height, width = image[0].shape[1:]
    shape = (frames // along, height // patch, width // patch)
    tokens = shape[0] * shape[1] * shape[2]
    words = max(caption.shape[0] for caption in captions)
    return layout(grid(*shape), registers(-tokens % 32), text(words), registers(-words % 32))


def hidream(model: Any, inputs: Inputs) -> TokenLayout:
    """Image, filled up when it is not square (the fill is attended to), then T5 and two layers of Llama."""
    latents = inputs["hidden_states"]
    patch = model.config.patch_size
    words = inputs["encoder_hidden_states_t5"].shape[1] + 2 * inputs["encoder_hidden_states_llama3"].shape[2]
    if latents.ndim == 4:
        height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
        fill = 0 if height == width else model.max_seq - height * width
    else:
        sizes = [[int(n) for n in size] for size in inputs["img_sizes"]]
        refuse_mixed(sizes)
        height, width = sizes[0]
        fill = latents.shape[1] - height * width
    return layout(grid(height, width), registers(fill), text(words))


def lumina2(model: Any, inputs: Inputs) -> TokenLayout:
    """Text cut to its length, then the image."""
    lengths = inputs["encoder_attention_mask"].sum(dim=1)
    refuse_mixed_rows(lengths)
    return layout(text(int(lengths[0])), _patches(model, inputs["hidden_states"]))


def aura_flow(model: Any, inputs: Inputs) -> TokenLayout:
    """Registers, text, image."""
    return layout(
        registers(model.register_tokens.shape[1]),
        text(inputs["encoder_hidden_states"].shape[1]),
        _patches(model, inputs["hidden_states"]),
    )


def _patch_shape(model: Any, latents: torch.Tensor) -> tuple[int, int]:
    patch = model.config.patch_size
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def _patches(model: Any, latents: torch.Tensor) -> list[Segment]:
    return grid(*_patch_shape(model, latents))


FAMILIES = (
    Family(
        "sd3",
        ("SD3Transformer2DModel",),
        ("transformer_blocks",),
        image_then_text,
        kinds=(("attn2", "self"), ("attn", "joint")),
        cfg="batched",
    ),
    Family(
        "z-image",
        ("ZImageTransformer2DModel",),
        ("layers",),
        z_image,
        kinds=(("attention", "joint"),),
        timestep="t",
        rising=True,
        lists=("x", "cap_feats"),
        cfg="batched",
    ),
    Family(
        "hidream",
        ("HiDreamImageTransformer2DModel",),
        ("double_stream_blocks", "single_stream_blocks"),
        hidream,
        kinds=(("attn1", "joint"),),
        timestep="timesteps",
        lists=("img_sizes", "hidden_states"),
        cfg="batched",
    ),
    Family("pixart", ("PixArtTransformer2DModel",), ("transformer_blocks",), image_only, cfg="batched"),
    Family("sana", ("SanaTransformer2DModel",), ("transformer_blocks",), image_only, cfg="batched"),
    Family(
        "lumina2",
        ("Lumina2Transformer2DModel",),
        ("layers",),
        lumina2,
        kinds=(("attn", "joint"),),
        rising=True,
        reads_values=("encoder_attention_mask",),
        lists=("hidden_states", "encoder_attention_mask"),
        cfg="two_pass",
    ),
    Family(
        "aura-flow",
        ("AuraFlowTransformer2DModel",),
        ("joint_transformer_blocks", "single_transformer_blocks"),
        aura_flow,
        kinds=(("attn", "joint"),),
        cfg="batched",
    ),
    Family("dit", ("DiTTransformer2DModel",), ("transformer_blocks",), image_only, cfg="batched"),
    Family("hunyuan-dit", ("HunyuanDiT2DModel",), ("blocks",), image_only, cfg="batched"),
    Family("lumina-next", ("LuminaNextDiT2DModel",), ("layers",), image_only, rising=True, cfg="batched"),
    Family(
        "transformer-2d",
        ("Transformer2DModel", "DreamLiteTransformer2DModel"),
        ("transformer_blocks",),
        feature_map,
        note="a part of UNets, which know it under their own name",
    ),
    Family(
        "cogview",
        ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
        ("transformer_blocks",),
        text_then_image,
        kinds=(("attn1", "joint"),),
    ),
    Family(
        "glm-image",
        ("GlmImageTransformer2DModel",),
        ("transformer_blocks",),
        glm_image,
        kinds=(("attn1", "joint"),),
        reads_values=("kv_caches",),
        queries=("text", "grid"),
    ),
    Family(
        "hunyuan-image",
        ("HunyuanImageTransformer2DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        hunyuan_image,
        kinds=(("attn", "joint"),),
    ),
    Family(
        "omnigen",
        ("OmniGenTransformer2DModel",),
        ("layers",),
        omnigen,
        kinds=(("self_attn", "joint"),),
        rising=True,
        note="words look only at what stands before them: their rows stay dense",
    ),
    Family("prx", ("PRXTransformer2DModel",), ("blocks",), text_then_image, kinds=(("attention", "joint"),), queries=("grid",)),
    Family(
        "bria-fibo2",
        ("BriaFibo2Transformer2DModel",),
        ("layers",),
        bria_fibo2,
        kinds=(("cross_attention", "cross"), ("attention", "joint")),
        reads_values=("encoder_attention_mask",),
        cfg="two_pass",
    ),
    Family(
        "joy-image",
        ("JoyImageEditTransformer3DModel",),
        ("double_blocks",),
        joy_image,
        kinds=(("attn", "joint"),),
        cfg="two_pass",
    ),
)
