"""Tiny image denoisers that cut [B, C, H, W] into patches themselves, with text beside, before, behind or across."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import TinyModel, latents, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]

HUNYUAN_IMAGE: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": (1, 1),
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "rope_axes_dim": (4, 4),
}
GLM_IMAGE: Drawn = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": 64,
}
ERNIE: Drawn = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 3,
    "ffn_hidden_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 1,
    "text_in_dim": 12,
    "rope_axes_dim": (8, 4, 4),
}
COGVIEW3: Drawn = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 2,
    "pos_embed_max_size": 32,
    "sample_size": 32,
}
COGVIEW4: Drawn = {**COGVIEW3, "attention_head_dim": 8, "condition_dim": 4}
OMNIGEN: Drawn = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "num_layers": 3,
    "pad_token_id": 0,
    "vocab_size": 100,
    "in_channels": 4,
    "time_step_dim": 4,
    "pos_embed_max_size": 32,
    "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
}
DIT: Drawn = {
    "in_channels": 4,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 3,
    "num_embeds_ada_norm": 8,
    "patch_size": 2,
    "sample_size": 16,
}
HUNYUAN_DIT: Drawn = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 4,
    "hidden_size": 16,
    "text_len": 4,
    "text_len_t5": 4,
}
LUMINA: Drawn = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 3,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "learn_sigma": False,
    "cross_attention_dim": 32,
}
PRX: Drawn = {
    "in_channels": 4,
    "patch_size": 2,
    "context_in_dim": 12,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 3,
    "axes_dim": [8, 8],
}
NUCLEUS: Drawn = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
    "moe_enabled": False,
    "capacity_factors": [8.0] * 3,
}
FIBO2: Drawn = {
    "in_channels": 4,
    "patch_size": 2,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 12,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 8,
    "max_num_gist_tokens": 16,
    "gist_step": 4,
    "gist_min_text_len": 4,
    "gist_max_text_len": 16,
    "axes_dims": (8, 4, 4),
    "axes_lens": (64, 64, 64),
}
JOY: Drawn = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
}
CONTINUOUS: Drawn = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 16,
    "num_layers": 3,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}


def hunyuan_image(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """An image, then two texts, the valid tokens of both before their padding."""
    mask, glyphs = torch.ones(1, 7), torch.ones(1, 4)
    mask[:, 5:], glyphs[:, 3:] = 0, 0
    return {
        "hidden_states": normal(g, 1, 4, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(g, 1, 7, 16),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": normal(g, 1, 4, 12),
        "encoder_attention_mask_2": glyphs,
    }


def glm_image(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Glyphs, then the image with one token of the language model added to each place."""
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 1, 7, 16),
        "prior_token_id": torch.randint(0, 64, (1, math.prod(grid)), generator=g),
        "prior_token_drop": torch.zeros(1, math.prod(grid), dtype=torch.bool),
        "timestep": torch.tensor([500]),
        "target_size": torch.tensor([[64.0, 48.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def ernie(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Two samples whose texts differ in length."""
    return {
        "hidden_states": normal(g, 2, 8, *grid),
        "timestep": torch.tensor([500.0, 500.0]),
        "text_bth": normal(g, 2, 7, 12),
        "text_lens": torch.tensor([7, 5]),
    }


def cogview(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Text, then the image."""
    sizes = torch.tensor([[128.0, 96.0]] * 2)
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 9, 8),
        "timestep": torch.tensor([500, 500]),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": torch.zeros(2, 2),
    }


def omnigen(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Twelve words, six of them places of an input image, the time, then the image; words see only what stands before."""
    words, length = 12, 12 + 1 + math.prod(grid)
    mask = torch.ones(1, length, length)
    mask[:, : words + 1] = torch.ones(length, length).tril()[: words + 1]
    mask[:, 2:8, 2:8] = 1
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.randint(1, 100, (1, words), generator=g),
        "input_img_latents": [normal(g, 1, 4, 4, 6)],
        "input_image_sizes": {0: [[2, 8]]},
        "attention_mask": mask,
        "position_ids": torch.arange(length)[None],
    }


def dit(g: torch.Generator, grid: Grid = (8, 8)) -> Drawn:
    """A square image and its class."""
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def hunyuan_dit(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Two texts by cross-attention."""
    angles = normal(g, math.prod(grid), 8)
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": normal(g, 2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": normal(g, 2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def lumina(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Text by cross-attention, its last two tokens padding."""
    mask = torch.ones(2, 9)
    mask[:, 7:] = 0
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_mask": mask,
        "image_rotary_emb": torch.polar(torch.ones(384, 384, 4), normal(g, 384, 384, 4)),
        "cross_attention_kwargs": {},
    }


def prx(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Text that is keys only, its last two tokens padding."""
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 7:] = False
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": normal(g, 1, 9, 12),
        "attention_mask": mask,
    }


def nucleus(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Packed tokens; text that is keys only, its last two tokens padding."""
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 16),
        "encoder_hidden_states": normal(g, 1, 8, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, *grid)],
    }


def fibo2(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """A text of two layers that a perceiver shortens, and a context image of 4 x 6 tokens."""
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": normal(g, 1, 2, 9, 12),
        "context_latents": [normal(g, 1, 4, 8, 12)],
    }


def fibo2_batch(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Two texts of different lengths: the shortened texts stand behind the image, some of them hidden."""
    mask = torch.ones(2, 16)
    mask[1, 4:] = 0
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": normal(g, 2, 2, 16, 12),
        "encoder_attention_mask": mask,
    }


def joy(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """The picture to be edited, last among the items given, and the one that is made, first in the sequence."""
    return {
        "hidden_states": normal(g, 1, 2, 4, 1, *latents(grid)),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "timestep": torch.tensor([500.0]),
    }


def joy_plus(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Patches of the picture that is made, of a reference of 4 x 6 tokens, and two of padding."""
    tokens = math.prod(grid) + 4 * 6
    return {
        "hidden_states": normal(g, 1, tokens + 2, 4, 1, 2, 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "encoder_hidden_states_mask": torch.ones(1, 9),
        "shape_list": [[(1, *grid), (1, 4, 6)]],
    }


def continuous(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """A feature map whose places are the tokens."""
    return {"hidden_states": normal(g, 2, 16, *grid), "encoder_hidden_states": normal(g, 2, 5, 12)}


_IMAGE: Any = {"axes": "BCHW", "large": (32, 24)}
TINY: dict[str, TinyModel] = {
    "hunyuan-image": TinyModel("HunyuanImageTransformer2DModel", HUNYUAN_IMAGE, hunyuan_image, **_IMAGE),
    "glm-image": TinyModel("GlmImageTransformer2DModel", GLM_IMAGE, glm_image, **_IMAGE),
    "ernie-image": TinyModel("ErnieImageTransformer2DModel", ERNIE, ernie, **_IMAGE),
    "cogview3-plus": TinyModel("CogView3PlusTransformer2DModel", COGVIEW3, cogview, **_IMAGE),
    "cogview4": TinyModel("CogView4Transformer2DModel", COGVIEW4, cogview, **_IMAGE),
    "omnigen": TinyModel("OmniGenTransformer2DModel", OMNIGEN, omnigen, **_IMAGE),
    "dit": TinyModel("DiTTransformer2DModel", DIT, dit, axes="BCHW", large=(32, 32)),
    "hunyuan-dit": TinyModel("HunyuanDiT2DModel", HUNYUAN_DIT, hunyuan_dit, **_IMAGE),
    "lumina-next": TinyModel("LuminaNextDiT2DModel", LUMINA, lumina, zero=("pad_token",), **_IMAGE),
    "prx": TinyModel("PRXTransformer2DModel", PRX, prx, **_IMAGE),
    "nucleus-moe": TinyModel("NucleusMoEImageTransformer2DModel", NUCLEUS, nucleus, axes="BSC", large=(32, 24)),
    "bria-fibo2": TinyModel("BriaFibo2Transformer2DModel", FIBO2, fibo2, **_IMAGE),
    "bria-fibo2-batch": TinyModel("BriaFibo2Transformer2DModel", FIBO2, fibo2_batch, **_IMAGE),
    "joy-image": TinyModel("JoyImageEditTransformer3DModel", JOY, joy, axes="BICFHW", large=(32, 24)),
    "joy-image-plus": TinyModel("JoyImageEditPlusTransformer3DModel", JOY, joy_plus, axes="BSC", large=(32, 24)),
    "transformer-2d": TinyModel("Transformer2DModel", CONTINUOUS, continuous, **_IMAGE),
    "dreamlite": TinyModel("DreamLiteTransformer2DModel", {**CONTINUOUS, "qk_norm": "rms_norm"}, continuous, **_IMAGE),
}
