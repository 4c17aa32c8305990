"""Tiny video denoisers with text before, behind or across, some with a past of their own in front."""

import math
from typing import Any

import torch

from genattn.pipelines.tiny.random.spec import TinyModel, latents, normal
from genattn.pipelines.tiny.random.videos import COGVIDEOX, LTX2, WAN

Drawn = dict[str, Any]
Grid = tuple[int, ...]

ALLEGRO: Drawn = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "cross_attention_dim": 24,
    "caption_channels": 8,
}
ANYFLOW: Drawn = {
    **{key: WAN[key] for key in ("patch_size", "num_attention_heads", "attention_head_dim", "freq_dim", "ffn_dim")},
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
ANYFLOW_FAR: Drawn = {**ANYFLOW, "full_chunk_limit": 2, "attention_head_dim": 24}
EASYANIMATE: Drawn = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "mmdit_layers": 2,
    "patch_size": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
}
HELIOS: Drawn = {
    **{key: WAN[key] for key in ("patch_size", "num_attention_heads", "attention_head_dim", "freq_dim", "ffn_dim")},
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "num_layers": 3,
    "rope_dim": (4, 4, 4),
    "is_amplify_history": True,
}
CONSISID: Drawn = {
    **COGVIDEOX,
    "cross_attn_interval": 1,
    "is_train_face": True,
    "cross_attn_dim_head": 4,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 2,
    "LFE_vit_dim": 2,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 1,
    "LFE_output_dim": 21,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 1,
}
MOTIF: Drawn = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_decoder_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "image_embed_dim": 4,
    "rope_axes_dim": (4, 4, 4),
    "enable_text_cross_attention_dual": True,
}
KANDINSKY5: Drawn = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "patch_size": (1, 2, 2),
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
}
KANDINSKY6: Drawn = {
    **KANDINSKY5,
    "visual_cond": False,
    "in_audio_dim": 5,
    "out_audio_dim": 5,
}
SANA_REFINER: Drawn = {**LTX2, "num_layers": 3, "attention_head_dim": 16, "cross_attention_dim": 32}
WAN_ANIMATE2: Drawn = {
    "text_len": 8,
    "in_dim": 8,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 12,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 3,
    "use_img_emb": False,
}


def allegro(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Text by cross-attention; the positions come as indices."""
    frames, height, width = grid
    axes = [axis.flatten()[None] for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")]
    tables = tuple((torch.ones(math.prod(grid), 4), normal(g, math.prod(grid), 4).sin()) for _ in axes)
    return {
        "hidden_states": normal(g, 1, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": normal(g, 1, 9, 8),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (tables, tuple(axes)),
    }


def anyflow(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Frames before channels, two timesteps per frame."""
    frames, height, width = latents(grid)
    return {
        "hidden_states": normal(g, 1, frames, 4, height, width),
        "timestep": torch.full((1, frames), 500.0),
        "r_timestep": torch.full((1, frames), 250.0),
        "encoder_hidden_states": normal(g, 1, 12, 16),
    }


def anyflow_far(g: torch.Generator, grid: Grid = (3, 4, 4)) -> Drawn:
    """The third chunk: one chunk of two frames compressed and one of one frame whole are kept as keys."""
    frames = grid[0]
    whole, coarse = grid[1] * grid[2], (grid[1] // 2) * (grid[2] // 2)
    cache = [
        {"compressed_cache": normal(g, 2, 1, 2, 2 * coarse, 24), "full_cache": normal(g, 2, 1, 2, whole, 24)} for _ in range(3)
    ]
    return {
        **anyflow(g, grid),
        "chunk_partition": [2, 1, frames],
        "kv_cache": cache,
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 2},
    }


def easyanimate(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Text, then video."""
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 9, 16),
    }


def helios(g: torch.Generator, grid: Grid = (3, 4, 4)) -> Drawn:
    """A past at a quarter and half resolution and whole, before the video; its edges do not divide."""
    _, height, width = latents(grid)
    past = {"short": 1, "mid": 2, "long": 5}
    history = {f"latents_history_{name}": normal(g, 1, 4, n, height, width) for name, n in past.items()}
    indices = {f"indices_latents_history_{name}": torch.arange(float(n))[None] for name, n in past.items()}
    return {
        "hidden_states": normal(g, 1, 4, *latents(grid)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 12, 16),
        "indices_hidden_states": 8 + torch.arange(float(grid[0]))[None],
        **history,
        **indices,
    }


def consisid(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """CogVideoX with a face that every second block looks at."""
    frames, height, width = latents(grid)
    return {
        "hidden_states": normal(g, 1, frames, 4, height, width),
        "encoder_hidden_states": normal(g, 1, 16, 32),
        "timestep": torch.tensor([500]),
        "id_vit_hidden": [normal(g, 1, 2, 2)],
        "id_cond": normal(g, 1, 2),
    }


def motif(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Video, then the embedding of an image, then text; the last block's keys are another stream of the video."""
    mask = torch.ones(1, 9)
    mask[:, 7:] = 0
    return {
        "hidden_states": normal(g, 1, 4, *grid),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "encoder_attention_mask": mask,
        "image_embeds": normal(g, 1, 5, 4),
    }


def kandinsky5(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Channels last; text by cross-attention."""
    return {
        "hidden_states": normal(g, 1, *latents(grid), 4),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": normal(g, 1, 8),
        "visual_rope_pos": tuple(torch.arange(n) for n in grid),
        "text_rope_pos": torch.arange(9),
    }


def kandinsky6(g: torch.Generator, grid: Grid = (3, 8, 6)) -> Drawn:
    """Video beside sound; each has its own attention and looks across at the other."""
    return {
        "hidden_states": normal(g, 1, *latents(grid), 4),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": normal(g, 1, 8),
        "audio_hidden_states": normal(g, 1, 11, 5),
    }


def sana_refiner(g: torch.Generator, grid: Grid = (3, 4, 6)) -> Drawn:
    """Packed tokens whose places stand in the rotary table alone; the frames are not those next to each other."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    frames, height, width = grid
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=32, num_attention_heads=2, double_precision=False)
    coordinates = rope.prepare_video_coords(1, frames, height, width, torch.device("cpu"))
    return {
        "hidden_states": normal(g, 1, math.prod(grid), 4),
        "encoder_hidden_states": normal(g, 1, 9, 16),
        "timestep": torch.full((1, math.prod(grid)), 500.0),
        "video_rotary_emb": rope(coordinates, device="cpu"),
    }


def wan_animate2(g: torch.Generator, grid: Grid = (3, 4, 6)) -> Drawn:
    """The forward that keeps the keys of the driving clip: its tokens alone, unmasked."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [normal(g, 4, *latents(grid))],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [normal(g, 6, 12)],
        "condition_latents": [normal(g, 4, *latents(grid))],
        "kv_cache": WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": math.prod(grid),
        "offset_grid_sizes": torch.tensor([grid]),
    }


TINY: dict[str, TinyModel] = {
    "allegro": TinyModel("AllegroTransformer3DModel", ALLEGRO, allegro),
    "anyflow": TinyModel("AnyFlowTransformer3DModel", ANYFLOW, anyflow, axes="BFCHW"),
    "anyflow-far": TinyModel("AnyFlowFARTransformer3DModel", ANYFLOW_FAR, anyflow_far, axes="BFCHW"),
    "easyanimate": TinyModel("EasyAnimateTransformer3DModel", EASYANIMATE, easyanimate),
    "helios": TinyModel("HeliosTransformer3DModel", HELIOS, helios),
    "consisid": TinyModel("ConsisIDTransformer3DModel", CONSISID, consisid, axes="BFCHW"),
    "motif-video": TinyModel("MotifVideoTransformer3DModel", MOTIF, motif),
    "kandinsky5": TinyModel("Kandinsky5Transformer3DModel", KANDINSKY5, kandinsky5, axes="BFHWC"),
    "kandinsky6": TinyModel("Kandinsky6Transformer3DModel", KANDINSKY6, kandinsky6, axes="BFHWC"),
    "sana-wm-refiner": TinyModel("SanaWMLTX2RefinerTransformer3DModel", SANA_REFINER, sana_refiner, axes="BSC"),
    "wan-animate2": TinyModel("WanAnimate2Transformer3DModel", WAN_ANIMATE2, wan_animate2, axes="[CFHW]"),
}
