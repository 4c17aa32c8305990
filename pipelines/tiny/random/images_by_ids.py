"""Tiny image denoisers that are told where every token stands: FLUX's kin, and sequences packed by the pipeline."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import TinyModel, image_ids, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]
_WORDS = 10

_FLUX: Drawn = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
BRIA: Drawn = {**_FLUX, "pooled_projection_dim": None}
FIBO: Drawn = {**BRIA, "text_encoder_dim": 16}
OVIS: Drawn = {**_FLUX, "out_channels": 4}
LONGCAT: Drawn = {**_FLUX, "pooled_projection_dim": 32}
FLUX3: Drawn = {
    "in_channels": 4,
    "cond_in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "timestep_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
KREA2: Drawn = {
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "timestep_embed_dim": 8,
    "text_hidden_dim": 16,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 2, 2),
}
IDEOGRAM4: Drawn = {
    "in_channels": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "adaln_dim": 16,
    "llm_features_dim": 12,
    "rope_theta": 10000,
    "mrope_section": (2, 1, 1),
}
QWEN21: Drawn = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 12,
    "axes_dims_rope": (8, 4, 4),
}


def by_ids(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """FLUX without a pooled text: an image behind ten tokens of text."""
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, _WORDS, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(grid),
        "txt_ids": torch.zeros(_WORDS, 3),
    }


def fibo(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """The hidden states of one layer of the text encoder for each of four blocks."""
    return {**by_ids(g, grid), "text_encoder_layers": [normal(g, 1, _WORDS, 16) for _ in range(4)]}


def longcat(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """Positions of the image start behind those of the text; a reference image behind the image (Edit)."""
    target = image_ids(grid, reference=1) + torch.tensor([0.0, 512.0, 512.0])
    reference = image_ids((4, 6), reference=2) + torch.tensor([0.0, 512.0, 512.0])
    ids = torch.cat([target, reference])
    return {**by_ids(g, grid), "hidden_states": normal(g, 1, len(ids), 4), "img_ids": ids}


def flux2_kv(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """FLUX.2 with a reference image before the image, whose keys are being kept: it sees nothing but itself."""
    from genattn.pipelines.tiny.random.images import flux2

    reference = image_ids((4, 6), columns=4, reference=10)
    ids = torch.cat([reference, image_ids(grid, columns=4)])[None]
    tokens = normal(g, 1, ids.shape[1], 4)
    kept = {"kv_cache_mode": "extract", "num_ref_tokens": len(reference)}
    return {**flux2(g, grid), "hidden_states": tokens, "img_ids": ids, **kept}


def flux3(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """An image with positions on a finer grid than its tokens, and a reference behind it."""
    fine = torch.tensor([1.0, 0.75, 0.75, 1.0])
    reference = image_ids((4, 6), columns=4) * fine
    reference[:, 3] = -1
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, _WORDS, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(grid, columns=4) * fine,
        "txt_ids": torch.zeros(_WORDS, 4),
        "image_cond_hidden_states": normal(g, 1, len(reference), 4),
        "image_cond_ids": reference,
    }


def krea2(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Text, its last token padding, then the image; one list of positions for both."""
    mask = torch.ones(1, _WORDS, dtype=torch.bool)
    mask[:, -1] = False
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, _WORDS, 3, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(_WORDS, 3), image_ids(grid)]),
        "encoder_attention_mask": mask,
    }


def ideogram4(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Three tokens of padding, seven of text, then the image; the padding is a document of its own."""
    padding, words, tokens = 3, 7, math.prod(grid)
    before, length = padding + words, padding + words + tokens
    states, texts = torch.zeros(1, length, 8), torch.zeros(1, length, 12)
    states[:, before:], texts[:, padding:before] = normal(g, 1, tokens, 8), normal(g, 1, words, 12)
    positions = torch.zeros(1, length, 3, dtype=torch.long)
    positions[0, padding:before] = torch.arange(words)[:, None]
    positions[0, before:] = image_ids(grid).long() + 65536
    positions[0, before:, 0] = 65536
    segments, roles = torch.ones(1, length, dtype=torch.long), torch.full((1, length), 2)
    segments[:, :padding], roles[:, :padding], roles[:, padding:before] = -1, 0, 3
    return {
        "hidden_states": states,
        "encoder_hidden_states": texts,
        "timestep": torch.tensor([0.5]),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": roles,
    }


def qwen21(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Text, a condition image of 4 x 6 tokens, text, then the image; a slot of the text stands for four image tokens."""
    condition = (1, 4, 6)
    slots, target = math.prod(condition) // 4, math.prod(grid) // 4
    mask = torch.tensor([[False] * 5 + [True] * slots + [False] * 4 + [True] * target])
    return {
        "hidden_states": normal(g, 1, 4 * (slots + target), 16),
        "encoder_hidden_states": normal(g, 1, 9 + slots, 12),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[condition, (1, *grid)]],
        "img_mask": mask,
    }


def _keep_keys(model: torch.nn.Module) -> None:
    """The processors that Flux2KleinKVPipeline puts on."""
    from diffusers.models.transformers import transformer_flux2

    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())  # type: ignore[union-attr]
    for block in model.single_transformer_blocks:  # type: ignore[union-attr]
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())  # type: ignore[union-attr]


_FLUX2: Drawn = {**_FLUX, "timestep_guidance_channels": 256, "axes_dims_rope": (4, 4, 4, 4)}
_IMAGE: Any = {"axes": "BSC", "large": (32, 24)}
TINY: dict[str, TinyModel] = {
    "flux2-kv": TinyModel("Flux2Transformer2DModel", _FLUX2, flux2_kv, prepare=_keep_keys, since=(0, 38), **_IMAGE),
    "flux3": TinyModel("Flux3Transformer2DModel", FLUX3, flux3, **_IMAGE),
    "bria": TinyModel("BriaTransformer2DModel", BRIA, by_ids, **_IMAGE),
    "bria-fibo": TinyModel("BriaFiboTransformer2DModel", FIBO, fibo, **_IMAGE),
    "ovis-image": TinyModel("OvisImageTransformer2DModel", OVIS, by_ids, **_IMAGE),
    "longcat-image": TinyModel("LongCatImageTransformer2DModel", LONGCAT, longcat, **_IMAGE),
    "krea2": TinyModel("Krea2Transformer2DModel", KREA2, krea2, **_IMAGE),
    "ideogram4": TinyModel("Ideogram4Transformer2DModel", IDEOGRAM4, ideogram4, **_IMAGE),
    "qwen-image-2.1": TinyModel("QwenImage21Transformer2DModel", QWEN21, qwen21, **_IMAGE),
}
