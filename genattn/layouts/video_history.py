"""Video transformers that hold a past beside what they make: in the sequence, or as keys kept from earlier chunks."""

import math
from collections.abc import Mapping
from typing import Any

from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.family import Family, grid, layout, patched, references, registers, text

Inputs = Mapping[str, Any]
_FRAMEPACK = (("history_4x", 4), ("history_2x", 2), ("clean", 1))
_HELIOS = (("long", 4), ("mid", 2), ("short", 1))
_FLEX_BLOCK = 128


def framepack(model: Any, inputs: Inputs) -> TokenLayout:
    """History at a quarter and at half resolution, clean latents, video, image embedding, text (cut to its length if B = 1)."""
    latents, patch = inputs["hidden_states"], (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    history = [_coarse(inputs.get(f"latents_{name}"), times, (1, *patch[1:])) for name, times in _FRAMEPACK]
    mask = inputs["encoder_attention_mask"]
    words = int(mask.sum()) if latents.shape[0] == 1 else mask.shape[1]
    picture = inputs["image_embeds"].shape[1] if inputs.get("image_embeds") is not None else 0
    return layout(references(*filter(None, history)), grid(*patched(latents, patch)), text(picture), text(words))


def helios(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents of long ago at a quarter, of the middle at half, of just now at full resolution, then the video."""
    patch = model.config.patch_size
    told = ((name, times) for name, times in _HELIOS if inputs.get(f"indices_latents_history_{name}") is not None)
    history = [_coarse(inputs.get(f"latents_history_{name}"), times, patch) for name, times in told]
    return layout(references(*filter(None, history)), grid(*patched(inputs["hidden_states"], patch)))


def _coarse(latents: Any, times: int, patch: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Raster of a piece of the past, patched `times` coarser than the video; the last patch is filled up."""
    if latents is None:
        return None
    frames, height, width = (-(-n // (times * p)) for n, p in zip(latents.shape[2:], patch))
    return frames, height, width


def anyflow_far(model: Any, inputs: Inputs) -> TokenLayout | None:
    """One chunk; its keys come behind those of compressed chunks and of the last whole ones, up to FlexAttention's block.

    None for the forwards that keep keys or train: their block mask says more than a pattern could.
    """
    config, flag, chunks = model.config, inputs.get("kv_cache_flag") or {}, list(inputs["chunk_partition"])
    if inputs.get("kv_cache") is None or flag.get("is_cache_step"):
        return None
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    seen = 1 + int(flag["num_cached_chunks"])
    far = max(0, seen - config.full_chunk_limit)
    coarse = (sum(chunks[:far]), height // config.compressed_patch_size[1], width // config.compressed_patch_size[2])
    shape = (height // config.patch_size[1], width // config.patch_size[2])
    whole = (sum(chunks[far : seen - 1]), *shape)
    fill = -math.prod((frames, *shape)) % _FLEX_BLOCK
    kept = references(*(piece for piece in (coarse, whole) if piece[0]))
    return layout(kept, grid(frames, *shape), registers(fill))


FAMILIES = (
    Family(
        "framepack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        framepack,
        kinds=(("attn", "joint"),),
        reads_values=("encoder_attention_mask",),
        cfg="two_pass",
    ),
    Family("helios", ("HeliosTransformer3DModel",), ("blocks",), helios),
    Family(
        "anyflow-far",
        ("AnyFlowFARTransformer3DModel",),
        ("blocks",),
        anyflow_far,
        reads_values=("kv_cache_flag",),
        queries=("grid", "register"),
        note="the forwards that keep keys have a block mask of their own and stay dense",
    ),
)
