"""The tiny image denoisers and UNets: settings and inputs. `grid` is the raster of tokens (height, width)."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import image_ids, latents, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]

FLUX: Drawn = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
FLUX2: Drawn = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "timestep_guidance_channels": 256,
    "axes_dims_rope": [4, 4, 4, 4],
}
CHROMA: Drawn = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}
SD3: Drawn = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}
SD35: Drawn = {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
QWEN: Drawn = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 4, 4),
}
Z_IMAGE: Drawn = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "qk_norm": True,
    "cap_feat_dim": 16,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}
HIDREAM: Drawn = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": [8, 4],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (32, 32),
    "llama_layers": (0, 1, 1),
    "force_inference_output": True,
}
PIXART: Drawn = {
    "sample_size": 16,
    "num_layers": 3,
    "patch_size": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "in_channels": 4,
    "cross_attention_dim": 8,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 8,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "use_additional_conditions": False,
    "caption_channels": None,
}
SANA: Drawn = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 32,
}
LUMINA2: Drawn = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 2,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "scaling_factor": 1.0,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (128, 128, 128),
    "cap_feat_dim": 32,
}
AURA_FLOW: Drawn = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "out_channels": 4,
    "pos_embed_max_size": 1024,
}
UNET: Drawn = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
UNET_XL: Drawn = {
    **UNET,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
ANIMATEDIFF: Drawn = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}


def flux(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """An image behind ten tokens of text."""
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, 10, 32),
        "pooled_projections": normal(g, 1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(grid),
        "txt_ids": torch.zeros(10, 3),
    }


def flux_kontext(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """A reference image of 4 x 6 tokens behind the image."""
    ids = torch.cat([image_ids(grid), image_ids((4, 6), reference=1)])
    return {**flux(g, grid), "hidden_states": normal(g, 1, ids.shape[0], 4), "img_ids": ids}


def flux2(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """Positions in four columns."""
    text_ids = torch.zeros(1, 10, 4)
    text_ids[0, :, 3] = torch.arange(10)
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, 10, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": image_ids(grid, columns=4)[None],
        "txt_ids": text_ids,
    }


def chroma(g: torch.Generator, grid: Grid = (8, 12)) -> Drawn:
    """A mask over text and image whose last text tokens are padding."""
    mask = torch.ones(1, 10 + math.prod(grid), dtype=torch.bool)
    mask[:, 7:10] = False
    drawn = {key: value for key, value in flux(g, grid).items() if key != "pooled_projections"}
    return {**drawn, "attention_mask": mask}


def sd3(g: torch.Generator, grid: Grid = (12, 16)) -> Drawn:
    """An image before nine tokens of text."""
    return {
        "hidden_states": normal(g, 2, 4, *grid),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "pooled_projections": normal(g, 2, 64),
        "timestep": torch.tensor([500, 500]),
    }


def qwen(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """An image behind the text, whose last two tokens are padding."""
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 16),
        "encoder_hidden_states": normal(g, 1, 8, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, *grid)]],
    }


def qwen_edit(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """A reference image of 4 x 6 tokens."""
    tokens = normal(g, 1, math.prod(grid) + 4 * 6, 16)
    return {**qwen(g, grid), "hidden_states": tokens, "img_shapes": [[(1, *grid), (1, 4, 6)]]}


def z_image(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Image and caption that are no multiples of 32."""
    return {"x": [normal(g, 16, 1, *latents(grid))], "cap_feats": [normal(g, 20, 16)], "t": torch.tensor([0.5])}


def hidream(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Not square: filled up to the largest sequence."""
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states_t5": normal(g, 2, 8, 8),
        "encoder_hidden_states_llama3": normal(g, 2, 2, 8, 4),
        "pooled_embeds": normal(g, 2, 8),
        "timesteps": torch.tensor([500, 500]),
    }


def pixart(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """An image alone."""
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": normal(g, 2, 8, 8),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def sana(g: torch.Generator, grid: Grid = (12, 16)) -> Drawn:
    """An image alone."""
    return {
        "hidden_states": normal(g, 2, 4, *grid),
        "encoder_hidden_states": normal(g, 2, 8, 8),
        "timestep": torch.tensor([500, 500]),
    }


def lumina2(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Both texts cut to twelve tokens."""
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 12:] = False
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 16, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_attention_mask": mask,
    }


def aura_flow(g: torch.Generator, grid: Grid = (8, 6)) -> Drawn:
    """Registers, text, image."""
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "timestep": torch.tensor([0.5, 0.5]),
    }


def unet(g: torch.Generator, grid: Grid = (16, 12)) -> Drawn:
    """`grid` is the first level."""
    return {"sample": normal(g, 2, 4, *grid), "timestep": torch.tensor(500), "encoder_hidden_states": normal(g, 2, 7, 8)}


def unet_xl(g: torch.Generator, grid: Grid = (16, 12)) -> Drawn:
    """With SDXL's pooled text and sizes."""
    added = {"text_embeds": normal(g, 2, 32), "time_ids": torch.ones(2, 6)}
    return {**unet(g, grid), "added_cond_kwargs": added}


def animatediff(g: torch.Generator, grid: Grid = (5, 16, 12)) -> Drawn:
    """Frames of a raster at the first level."""
    return {
        "sample": normal(g, 2, 4, *grid),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(g, 2 * grid[0], 4, 16),
    }
