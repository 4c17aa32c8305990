"""Image transformers and UNets."""

from collections.abc import Mapping
from typing import Any

import torch

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout, references, registers, text
from genattn.layouts.site import SiteKind

Inputs = Mapping[str, Any]
_FLUX_STACKS = ("transformer_blocks", "single_transformer_blocks")


def image_only(model: Any, inputs: Inputs) -> TokenLayout:
    """PixArt, Sana: patches of [B, C, H, W]; text by cross-attention."""
    return layout(_patches(model, inputs["hidden_states"]))


def image_then_text(model: Any, inputs: Inputs) -> TokenLayout:
    """SD3: patches of [B, C, H, W], then text."""
    return layout(_patches(model, inputs["hidden_states"]), text(inputs["encoder_hidden_states"].shape[1]))


def text_then_ids(model: Any, inputs: Inputs) -> TokenLayout | None:
    """FLUX, Chroma: text, then the image, then (Kontext) reference images; (reference, row, column) stand in img_ids."""
    shapes = rasters(inputs["img_ids"], first=1)
    if shapes is None:
        return None
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(*shapes[0]), references(*shapes[1:]))


def rasters(ids: torch.Tensor, first: int) -> list[tuple[int, int]] | None:
    """Height and width of every image in a list of token positions; row and column stand in columns `first`, `first + 1`.

    An image ends where the other columns change. None when an image is not a full raster.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    others = torch.cat([ids[:, :first], ids[:, first + 2 :]], dim=1)
    changes = ((others[1:] != others[:-1]).any(dim=1).nonzero().flatten() + 1).tolist()
    shapes = []
    for begin, end in zip([0, *changes], [*changes, ids.shape[0]]):
        rows, columns = ids[begin:end, first], ids[begin:end, first + 1]
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        if height * width != end - begin:
            return None
        shapes.append((height, width))
    return shapes


def qwen_image(model: Any, inputs: Inputs) -> TokenLayout:
    """Text, then the image, then (Edit) reference images; their shapes come as numbers."""
    shapes = inputs["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(*shapes[0]), references(*shapes[1:]))


def z_image(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Image, then caption, each filled up to a multiple of 32 with learned tokens that are attended to."""
    image, captions = inputs["x"], inputs["cap_feats"]
    if not isinstance(image[0], torch.Tensor) or not isinstance(captions[0], torch.Tensor):
        return None  # the omni model has several images in a sample
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
        height, width = (int(n) for n in inputs["img_sizes"][0])
        fill = latents.shape[1] - height * width
    return layout(grid(height, width), registers(fill), text(words))


def lumina2(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text cut to its length, then the image; none when the samples' texts differ in length."""
    lengths = inputs["encoder_attention_mask"].sum(dim=1).tolist()
    if len(set(lengths)) > 1:
        return None
    return layout(text(int(lengths[0])), _patches(model, inputs["hidden_states"]))


def aura_flow(model: Any, inputs: Inputs) -> TokenLayout:
    """Registers, text, image."""
    return layout(
        registers(model.register_tokens.shape[1]),
        text(inputs["encoder_hidden_states"].shape[1]),
        _patches(model, inputs["hidden_states"]),
    )


def unet(model: Any, inputs: Inputs) -> TokenLayout:
    """The latents themselves; every level of the UNet halves them."""
    return layout(grid(*inputs["sample"].shape[2:]))


def unet_level(kind: SiteKind, length: int, whole: TokenLayout) -> TokenLayout | None:
    """The level of the UNet whose raster has `length` places; the frames for motion modules."""
    frames, height, width = whole.grid3
    if kind == "temporal":
        return TokenLayout((Segment("grid", (frames,)),)) if length == frames else None
    while height * width > length and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    return TokenLayout((Segment("grid", (height, width)),)) if height * width == length else None


def unet_tokens(model: Any, site: str, whole: TokenLayout) -> int:
    """Places at the level of the UNet at which `site` stands; the frames for motion modules."""
    frames, height, width = whole.grid3
    if "motion_modules" in site:
        return frames
    last = len(model.down_blocks) - 1
    section, *rest = site.split(".")
    level = {"down_blocks": lambda: int(rest[0]), "up_blocks": lambda: last - int(rest[0])}.get(section, lambda: last)()
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height * width


def _patches(model: Any, latents: torch.Tensor) -> list[Segment]:
    patch = model.config.patch_size
    return grid(latents.shape[-2] // patch, latents.shape[-1] // patch)


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
        "flux",
        ("FluxTransformer2DModel", "Flux2Transformer2DModel"),
        _FLUX_STACKS,
        text_then_ids,
        kinds=(("attn", "joint"),),
        reads_values=("img_ids",),
        cfg="two_pass",
    ),
    Family(
        "chroma",
        ("ChromaTransformer2DModel",),
        _FLUX_STACKS,
        text_then_ids,
        kinds=(("attn", "joint"),),
        reads_values=("img_ids",),
        cfg="two_pass",
        note="the stock pipeline's mask is a float product, which adds 1 between valid tokens: a bias, so it stays dense",
    ),
    Family("qwen-image", ("QwenImageTransformer2DModel",), ("transformer_blocks",), qwen_image, kinds=(("attn", "joint"),)),
    Family(
        "z-image",
        ("ZImageTransformer2DModel",),
        ("layers",),
        z_image,
        kinds=(("attention", "joint"),),
        timestep="t",
        rising=True,
        cfg="batched",
    ),
    Family(
        "hidream",
        ("HiDreamImageTransformer2DModel",),
        ("double_stream_blocks", "single_stream_blocks"),
        hidream,
        kinds=(("attn1", "joint"),),
        timestep="timesteps",
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
    Family(
        "unet",
        ("UNet2DConditionModel",),
        ("down_blocks", "mid_block", "up_blocks"),
        unet,
        site_layout=unet_level,
        site_tokens=unet_tokens,
        cfg="batched",
    ),
    Family(
        "animatediff",
        ("UNetMotionModel",),
        ("down_blocks", "mid_block", "up_blocks"),
        unet,
        kinds=((r"motion_modules\..*\.attn\d", "temporal"), ("attn2", "cross"), ("attn1", "spatial")),
        site_layout=unet_level,
        site_tokens=unet_tokens,
        cfg="batched",
    ),
)
