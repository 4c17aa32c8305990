"""Video transformers. All grids are rasters (frames, height, width) with width fastest."""

from collections.abc import Mapping
from typing import Any

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout, patched, references, text
from genattn.layouts.site import SiteKind

Inputs = Mapping[str, Any]


def video_only(model: Any, inputs: Inputs) -> TokenLayout:
    """Wan, SkyReels, Cosmos: latents [B, C, F, H, W] under patch_size (frames, height, width); text by cross-attention."""
    return layout(grid(*patched(inputs["hidden_states"], model.config.patch_size)))


def hunyuan_video(model: Any, inputs: Inputs) -> TokenLayout:
    """Video, then text with its padding (a key mask hides it)."""
    return layout(grid(*patched(inputs["hidden_states"], _patch(model))), text(inputs["encoder_hidden_states"].shape[1]))


def hunyuan_video_15(model: Any, inputs: Inputs) -> TokenLayout:
    """Video, then the tokens of image, byT5 and text, the valid ones first."""
    condition = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
    return layout(
        grid(*patched(inputs["hidden_states"], _patch(model))), text(sum(inputs[name].shape[1] for name in condition))
    )


def framepack(model: Any, inputs: Inputs) -> TokenLayout:
    """History at a quarter and at half resolution, clean latents, video, image embedding, text (cut to its length if B = 1)."""
    latents = inputs["hidden_states"]
    patch = model.config.patch_size
    history = [_history(inputs.get(f"latents_{name}"), times, patch) for name, times in _HISTORY]
    mask = inputs["encoder_attention_mask"]
    words = int(mask.sum()) if latents.shape[0] == 1 else mask.shape[1]
    picture = inputs["image_embeds"].shape[1] if inputs.get("image_embeds") is not None else 0
    return layout(references(*filter(None, history)), grid(*patched(latents, _patch(model))), text(picture), text(words))


_HISTORY = (("history_4x", 4), ("history_2x", 2), ("clean", 1))


def _history(latents: Any, times: int, patch: int) -> tuple[int, int, int] | None:
    """Raster of a piece of the past, patched `times` coarser than the video; the last patch is filled up."""
    if latents is None:
        return None
    frames, height, width = latents.shape[2:]
    return -(-frames // times), -(-height // (times * patch)), -(-width // (times * patch))


def mochi(model: Any, inputs: Inputs) -> TokenLayout:
    """Video, then text; each sample is attended alone with its own number of text tokens."""
    patch = model.config.patch_size
    return layout(grid(*patched(inputs["hidden_states"], (1, patch, patch))), text(inputs["encoder_hidden_states"].shape[1]))


def cogvideox(model: Any, inputs: Inputs) -> TokenLayout:
    """Text, then video; latents [B, F, C, H, W], version 1.5 with a temporal patch."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    patch, along = model.config.patch_size, model.config.patch_size_t or 1
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(-(-frames // along), height // patch, width // patch))


def ltx(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Packed latents [B, S, C]; the grid comes as numbers, or stands in the coordinates behind tokens of condition frames."""
    tokens = inputs["hidden_states"].shape[1]
    if inputs.get("num_frames") is not None:
        shape = (inputs["num_frames"], inputs["height"], inputs["width"])
        extra = tokens - shape[0] * shape[1] * shape[2]
        return layout(grid(*shape), references((extra,)) if extra > 0 else [])
    coordinates = inputs["video_coords"][0]
    height, width = (int(coordinates[axis].unique().numel()) for axis in (1, 2))
    times = coordinates[0][:: height * width]
    first = int((times == times.min()).nonzero()[-1])
    shape = (times.numel() - first, height, width)
    before = first * height * width
    if before + shape[0] * height * width != tokens:
        return None
    return layout(references((first, height, width)) if before else [], grid(*shape))


def latte(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, C, F, H, W]; each attention sees one frame, or one place through all frames."""
    patch = model.config.patch_size
    return layout(grid(*patched(inputs["hidden_states"], (1, patch, patch))))


def frame_or_place(kind: SiteKind, length: int, whole: TokenLayout) -> TokenLayout | None:
    """The frames alone for temporal attention, one frame for spatial attention."""
    frames, height, width = whole.grid3
    shape = (frames,) if kind == "temporal" else (height, width)
    fits = length == (frames if kind == "temporal" else height * width)
    return TokenLayout((Segment("grid", shape),)) if fits else None


def _patch(model: Any) -> tuple[int, int, int]:
    config = model.config
    return config.patch_size_t, config.patch_size, config.patch_size


FAMILIES = (
    Family(
        "wan",
        ("WanTransformer3DModel", "ChronoEditTransformer3DModel", "WanAnimateTransformer3DModel"),
        ("blocks",),
        video_only,
    ),
    Family("wan-vace", ("WanVACETransformer3DModel",), ("vace_blocks", "blocks"), video_only, side_by_side=True),
    Family("skyreels", ("SkyReelsV2Transformer3DModel",), ("blocks",), video_only),
    Family("cosmos", ("CosmosTransformer3DModel",), ("transformer_blocks",), video_only, cfg="two_pass"),
    Family(
        "hunyuan-video",
        ("HunyuanVideoTransformer3DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        hunyuan_video,
        kinds=(("attn", "joint"),),
    ),
    Family(
        "hunyuan-video-1.5",
        ("HunyuanVideo15Transformer3DModel",),
        ("transformer_blocks",),
        hunyuan_video_15,
        kinds=(("attn", "joint"),),
    ),
    Family(
        "framepack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        framepack,
        kinds=(("attn", "joint"),),
        reads_values=("encoder_attention_mask",),
        cfg="two_pass",
    ),
    Family(
        "mochi",
        ("MochiTransformer3DModel",),
        ("transformer_blocks",),
        mochi,
        kinds=(("attn1", "joint"),),
        text_varies=True,
    ),
    Family("cogvideox", ("CogVideoXTransformer3DModel",), ("transformer_blocks",), cogvideox, kinds=(("attn1", "joint"),)),
    Family("ltx", ("LTXVideoTransformer3DModel",), ("transformer_blocks",), ltx, reads_values=("video_coords",)),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        ("transformer_blocks",),
        ltx,
        kinds=(("audio_attn1", "refiner"), (r"audio_attn2|attn2|\w+_to_\w+_attn", "cross")),
        reads_values=("video_coords",),
        note="the audio's own attention stays dense",
    ),
    Family(
        "latte",
        ("LatteTransformer3DModel",),
        ("transformer_blocks", "temporal_transformer_blocks"),
        latte,
        kinds=(("attn2", "cross"), (r"temporal_transformer_blocks\.\d+\.attn1", "temporal"), ("attn1", "spatial")),
        site_layout=frame_or_place,
        side_by_side=True,
        cfg="batched",
    ),
)
