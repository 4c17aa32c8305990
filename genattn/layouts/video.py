"""Video transformers. All grids are rasters (frames, height, width) with width fastest."""

from collections.abc import Mapping
from typing import Any

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout, patched, references, refuse_mixed_rows, text
from genattn.layouts.positions import spread_table
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
    refuse_mixed_rows(inputs["video_coords"])
    coordinates = inputs["video_coords"][0]
    height, width = (int(coordinates[axis].unique().numel()) for axis in (1, 2))
    times = coordinates[0][:: height * width]
    first = int((times == times.min()).nonzero()[-1])
    shape = (times.numel() - first, height, width)
    before = first * height * width
    if before + shape[0] * height * width != tokens:
        return None
    return layout(references((first, height, width)) if before else [], grid(*shape))


def consisid(model: Any, inputs: Inputs) -> TokenLayout:
    """As CogVideoX, without a temporal patch."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    patch = model.config.patch_size
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(frames, height // patch, width // patch))


def allegro(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, C, F, H, W]; text by cross-attention."""
    return layout(grid(*patched(inputs["hidden_states"], _patch(model))))


def anyflow(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, F, C, H, W] under patch_size; text by cross-attention."""
    return layout(grid(*patched(inputs["hidden_states"].transpose(1, 2), model.config.patch_size)))


def easyanimate(model: Any, inputs: Inputs) -> TokenLayout:
    """One or two texts, then video; latents [B, C, F, H, W]."""
    patch, second = model.config.patch_size, inputs.get("encoder_hidden_states_t5")
    words = inputs["encoder_hidden_states"].shape[1] + (0 if second is None else second.shape[1])
    return layout(text(words), grid(*patched(inputs["hidden_states"], (1, patch, patch))))


def motif_video(model: Any, inputs: Inputs) -> TokenLayout:
    """Video, then the embedding of an image, then text with its padding (a key mask hides it)."""
    picture = inputs.get("image_embeds")
    words = inputs["encoder_hidden_states"].shape[1] + (0 if picture is None else picture.shape[1])
    return layout(grid(*patched(inputs["hidden_states"], _patch(model))), text(words))


def motif_site(kind: SiteKind, length: int, whole: TokenLayout) -> TokenLayout | None:
    """The run's layout; in the last blocks the video as it came from the ones before stands where the text stood."""
    if length == whole.seqlen:
        return whole
    shape = whole.grid3
    again = TokenLayout((Segment("grid", shape), Segment("reference", shape)))
    return again if length == again.seqlen else None


def kandinsky(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Latents [B, F, H, W, C] under patch_size; text by cross-attention. None under NABLA, whose block mask is its own."""
    if inputs.get("sparse_params") is not None:
        return None
    return layout(grid(*patched(inputs["hidden_states"].movedim(-1, 1), model.config.patch_size)))


def wan_animate2(model: Any, inputs: Inputs) -> TokenLayout | None:
    """The driving clip, while its keys are being kept; afterwards every frame sees them by a block mask of the model's own."""
    if inputs["kv_cache_mode"] != "extract" or len({latents.shape for latents in inputs["hidden_states"]}) > 1:
        return None
    return layout(grid(*patched(inputs["hidden_states"][0][None], model.config.patch_size)))


def refiner(model: Any, inputs: Inputs) -> TokenLayout | None:
    """SANA-WM's refiner: packed latents [B, S, C] whose raster stands in the rotary table alone."""
    table = inputs["video_rotary_emb"][0]
    table = table[0] if table.ndim == 3 else table[0].transpose(0, 1).flatten(1)
    shape = spread_table(table)
    return None if shape is None or inputs.get("kv_cache_mode") not in (None, "capture_pre_rope") else layout(grid(*shape))


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
        "mochi",
        ("MochiTransformer3DModel",),
        ("transformer_blocks",),
        mochi,
        kinds=(("attn1", "joint"),),
        text_varies=True,
    ),
    Family("cogvideox", ("CogVideoXTransformer3DModel",), ("transformer_blocks",), cogvideox, kinds=(("attn1", "joint"),)),
    Family(
        "ltx",
        ("LTXVideoTransformer3DModel",),
        ("transformer_blocks",),
        ltx,
        reads_values=("video_coords",),
        lists=("hidden_states", "video_coords"),
    ),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        ("transformer_blocks",),
        ltx,
        kinds=(("audio_attn1", "refiner"), (r"audio_attn2|attn2|\w+_to_\w+_attn", "cross")),
        reads_values=("video_coords",),
        lists=("hidden_states", "video_coords"),
        note="the audio's own attention stays dense",
    ),
    Family("consisid", ("ConsisIDTransformer3DModel",), ("transformer_blocks",), consisid, kinds=(("attn1", "joint"),)),
    Family("allegro", ("AllegroTransformer3DModel",), ("transformer_blocks",), allegro, cfg="batched"),
    Family("anyflow", ("AnyFlowTransformer3DModel",), ("blocks",), anyflow, cfg="batched"),
    Family(
        "easyanimate",
        ("EasyAnimateTransformer3DModel",),
        ("transformer_blocks",),
        easyanimate,
        kinds=(("attn1", "joint"),),
        cfg="batched",
    ),
    Family(
        "motif-video",
        ("MotifVideoTransformer3DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        motif_video,
        kinds=(("cross_attn", "cross"), ("attn", "joint")),
        site_layout=motif_site,
    ),
    Family(
        "kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        ("visual_transformer_blocks",),
        kandinsky,
        kinds=(("self_attention", "self"), ("cross_attention", "cross")),
        note="checkpoints with attention_type nabla have a block mask of their own, chosen by content, and stay as they are",
    ),
    Family(
        "kandinsky6",
        ("Kandinsky6Transformer3DModel",),
        ("visual_transformer_blocks",),
        kandinsky,
        kinds=((r"video_dec_block\.self_attention", "self"), ("self_attention", "refiner"), (r"\w*cross_attention", "cross")),
        note="the sound's own attention stays dense",
    ),
    Family(
        "wan-animate2",
        ("WanAnimate2Transformer3DModel",),
        ("blocks",),
        wan_animate2,
        kinds=(("cross_attn", "cross"), ("self_attn", "self")),
        note="only the forward over the driving clip: the others have a block mask of their own and stay dense",
    ),
    Family(
        "sana-wm-refiner",
        ("SanaWMLTX2RefinerTransformer3DModel",),
        ("transformer_blocks",),
        refiner,
        kinds=(("audio_attn1", "refiner"), (r"audio_attn2|attn2|\w+_to_\w+_attn", "cross")),
        reads_values=("video_rotary_emb",),
        generic=True,
        note="windows that look at kept keys stay dense",
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
