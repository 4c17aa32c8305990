"""Video transformers whose pipeline packs text, references, sound and video into one sequence and says where each stands.

MiniMax-H3    text | conditions | references | sound | video       every row has a noise level of its own
Cosmos 3      text, which sees only what stands before it | video | sound | actions
"""

from collections.abc import Mapping
from typing import Any

import torch

from genattn.geometry.token_layout import SegmentKind, TokenLayout
from genattn.layouts.family import Family
from genattn.layouts.positions import OTHER, SOUND, TEXT, VIDEO, packed

Inputs = Mapping[str, Any]


def minimax_h3(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Rows by `text_indices`, `audio_indices`, `video_indices`; the last raster of (t, h, w) of one noise level is made."""
    rows = {TEXT: inputs["text_indices"], SOUND: inputs["audio_indices"], VIDEO: inputs["video_indices"]}
    places = inputs["position_ids"]
    return packed(places.shape[0], rows, places, inputs["timestep_indices"])


def cosmos3(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text is the first `und_len` rows; the rasters in `position_ids` must be those of `vision_token_shapes`."""
    length, words = int(inputs["sequence_length"]), int(inputs["und_len"])
    rows: dict[SegmentKind, torch.Tensor] = {TEXT: torch.arange(words), VIDEO: inputs["vision_sequence_indexes"]}
    more: dict[SegmentKind, str] = {SOUND: "sound_sequence_indexes", OTHER: "action_sequence_indexes"}
    for kind, name in more.items():
        if inputs.get(name) is not None:
            rows[kind] = inputs[name]
    places = inputs["position_ids"]
    found = packed(length, rows, places.reshape(-1, length).T.expand(-1, 3), None)
    told = [tuple(int(n) for n in shape) for shape in inputs["vision_token_shapes"]]
    if found is None or [s.shape for s in found.segments if s.kind in (VIDEO, "grid")] != told:
        return None
    return found


FAMILIES = (
    Family(
        "minimax-h3",
        ("MiniMaxH3Transformer3DModel",),
        ("transformer_blocks",),
        minimax_h3,
        kinds=(("attn", "joint"),),
        rising=True,
        reads_values=("text_indices", "audio_indices", "video_indices", "position_ids", "timestep_indices"),
        generic=True,
        note="guidance-distilled: one pass a step; text, references and sound are exact",
    ),
    Family(
        "cosmos3",
        ("Cosmos3OmniTransformer",),
        ("layers",),
        cosmos3,
        kinds=(("self_attn", "joint"),),
        timestep="vision_timesteps",
        reads_values=("vision_sequence_indexes", "sound_sequence_indexes", "action_sequence_indexes", "position_ids"),
        queries=("grid", "reference", "audio", "register"),
        generic=True,
        note="text looks only at what stands before it: that call stays dense",
    ),
)
