"""The tiny video denoisers: settings and inputs. `grid` is the raster of tokens (frames, height, width)."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import latents, normal

Drawn = dict[str, Any]
Grid = tuple[int, ...]

WAN: Drawn = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
WAN_I2V: Drawn = {**WAN, "in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24}
WAN_VACE: Drawn = {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 48}
SKYREELS: Drawn = {**WAN}
WAN_ANIMATE: Drawn = {
    **WAN,
    "in_channels": 12,
    "latent_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "num_layers": 2,
    "image_dim": 16,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}


def wan(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Video alone."""
    return {
        "hidden_states": normal(g, 1, 16, *latents(grid)),
        "encoder_hidden_states": normal(g, 1, 12, 32),
        "timestep": torch.tensor([500]),
    }


def wan_i2v(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """An image embedding before the 512 text tokens."""
    return {
        "hidden_states": normal(g, 1, 36, *latents(grid)),
        "encoder_hidden_states": normal(g, 1, 512, 32),
        "encoder_hidden_states_image": normal(g, 1, 5, 16),
        "timestep": torch.tensor([500]),
    }


def wan_ti2v(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """One timestep per token, zero in the first frame."""
    timestep = torch.full((1, math.prod(grid)), 500)
    timestep[:, : grid[1] * grid[2]] = 0
    return {**wan(g, grid), "timestep": timestep}


def wan_vace(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Control latents beside the video."""
    return {**wan(g, grid), "control_hidden_states": normal(g, 1, 48, *latents(grid))}


def wan_animate(g: torch.Generator, grid: Grid = (21, 4, 6)) -> Drawn:
    """Pose latents and 77 face frames beside 21 frames of video."""
    return {
        "hidden_states": normal(g, 1, 12, *latents(grid)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 12, 16),
        "encoder_hidden_states_image": normal(g, 1, 12, 16),
        "pose_hidden_states": normal(g, 1, 4, *latents((grid[0] - 1, *grid[1:]))),
        "face_pixel_values": normal(g, 1, 3, 77, 16, 16),
    }


HUNYUAN: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
HUNYUAN_15: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 12,
    "rope_axes_dim": (2, 2, 4),
    "target_size": 16,
    "task_type": "t2v",
}
FRAMEPACK: Drawn = {
    **HUNYUAN,
    "num_layers": 1,
    "patch_size": 2,
    "has_image_proj": True,
    "image_proj_dim": 16,
    "has_clean_x_embedder": True,
}


def hunyuan(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Video, two of the twelve text tokens padding."""
    mask = torch.ones(1, 12)
    mask[:, 10:] = 0
    return {
        "hidden_states": normal(g, 1, 4, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(g, 1, 12, 16),
        "pooled_projections": normal(g, 1, 8),
        "encoder_attention_mask": mask,
        "guidance": torch.tensor([1000.0]),
    }


def hunyuan_15(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Two texts, one of them padded, and no image."""
    mask = torch.ones(1, 6)
    mask[:, 4:] = 0
    return {
        "hidden_states": normal(g, 1, 4, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(g, 1, 6, 16),
        "encoder_hidden_states_2": normal(g, 1, 4, 8),
        "encoder_attention_mask": mask,
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def framepack(g: torch.Generator, grid: Grid = (3, 4, 2)) -> Drawn:
    """Three stretches of the past before the video."""
    frames, height, width = latents(grid)
    return {
        "hidden_states": normal(g, 1, 4, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 12, 16),
        "pooled_projections": normal(g, 1, 8),
        "encoder_attention_mask": torch.ones(1, 12),
        "guidance": torch.tensor([1000]),
        "image_embeds": normal(g, 1, 7, 16),
        "indices_latents": torch.ones(frames),
        "latents_clean": normal(g, 1, 4, 2, height, width),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": normal(g, 1, 4, 2, height, width),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": normal(g, 1, 4, 8, height, width),
        "indices_latents_history_4x": torch.ones(8),
    }


MOCHI: Drawn = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "pooled_projection_dim": 16,
    "in_channels": 12,
    "out_channels": None,
    "qk_norm": "rms_norm",
    "text_embed_dim": 32,
    "time_embed_dim": 4,
    "activation_fn": "swiglu",
    "max_sequence_length": 16,
}
COGVIDEOX: Drawn = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 32,
    "num_layers": 3,
    "sample_width": 12,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 16,
}
COGVIDEOX_15: Drawn = {
    **COGVIDEOX,
    "patch_size_t": 2,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
    "attention_head_dim": 16,
}
LTX: Drawn = {
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 32,
}
LTX2: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 16,
    "rope_double_precision": False,
}
COSMOS: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (16, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": "learnable",
}
LATTE: Drawn = {
    "sample_size": 8,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "caption_channels": 8,
    "in_channels": 4,
    "cross_attention_dim": 8,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "video_length": 4,
}


def mochi(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Two samples whose texts differ in length."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    return {
        "hidden_states": normal(g, 2, 12, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": mask,
    }


def cogvideox(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Video behind the text."""
    frames, height, width = latents(grid)
    return {
        "hidden_states": normal(g, 2, frames, 4, height, width),
        "encoder_hidden_states": normal(g, 2, 16, 32),
        "timestep": torch.tensor([500, 500]),
    }


def cogvideox_15(g: torch.Generator, grid: Grid = (2, 8, 6)) -> Drawn:
    """A temporal patch of two, with rotary embedding."""
    angles = normal(g, math.prod(grid), 16)
    video = normal(g, 2, 2 * grid[0], 4, 2 * grid[1], 2 * grid[2])
    return {**cogvideox(g), "hidden_states": video, "image_rotary_emb": (angles.cos(), angles.sin())}


def ltx(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Packed tokens of video."""
    return {
        "hidden_states": normal(g, 2, math.prod(grid), 8),
        "encoder_hidden_states": normal(g, 2, 9, 32),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, 9, dtype=torch.bool),
        **dict(zip(("num_frames", "height", "width"), grid)),
    }


def ltx_condition(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Tokens of a condition frame before the video, told by coordinates alone, one timestep per token."""
    times = torch.cat([torch.zeros(2), torch.arange(grid[0] - 1) * 8.0 + 1])
    axes = (times, torch.arange(float(grid[1])) * 32, torch.arange(float(grid[2])) * 32)
    frames, rows, columns = torch.meshgrid(*axes, indexing="ij")
    coordinates = torch.stack([frames.flatten(), rows.flatten(), columns.flatten()])[None].expand(2, -1, -1)
    timestep = torch.full((2, frames.numel()), 500)
    timestep[:, : grid[1] * grid[2]] = 0
    drawn = {
        **ltx(g, grid),
        "hidden_states": normal(g, 2, frames.numel(), 8),
        "timestep": timestep,
        "video_coords": coordinates,
    }
    return {key: value for key, value in drawn.items() if key not in ("num_frames", "height", "width")}


def ltx2(g: torch.Generator, grid: Grid = (2, 8, 6)) -> Drawn:
    """Video and nine frames of audio."""
    return {
        "hidden_states": normal(g, 2, math.prod(grid), 4),
        "audio_hidden_states": normal(g, 2, 9, 4),
        "encoder_hidden_states": normal(g, 2, 9, 16),
        "audio_encoder_hidden_states": normal(g, 2, 9, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.ones(2, 9, dtype=torch.bool),
        **dict(zip(("num_frames", "height", "width"), grid)),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def cosmos(g: torch.Generator, grid: Grid = (2, 8, 6)) -> Drawn:
    """Video alone."""
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 12, 16),
        "attention_mask": torch.ones(1, 12),
        "fps": 30,
    }


def latte(g: torch.Generator, grid: Grid = (4, 4, 4)) -> Drawn:
    """Frames that are square, as Latte's position table is."""
    return {
        "hidden_states": normal(g, 2, 4, *latents(grid)),
        "encoder_hidden_states": normal(g, 2, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "enable_temporal_attentions": True,
    }
