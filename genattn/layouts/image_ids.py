"""Image transformers that are told where each token stands: FLUX and its kin, and sequences packed by the pipeline."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout, references, refuse_mixed, refuse_mixed_rows, text
from genattn.layouts.positions import rasters

Inputs = Mapping[str, Any]
_FLUX_STACKS = ("transformer_blocks", "single_transformer_blocks")


def text_then_ids(model: Any, inputs: Inputs) -> TokenLayout | None:
    """FLUX, Chroma: text, then the image, then (Kontext) reference images; (reference, row, column) stand in img_ids."""
    shapes = rasters(inputs["img_ids"], first=1)
    if shapes is None:
        return None
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(*shapes[0]), references(*shapes[1:]))


def flux2(model: Any, inputs: Inputs) -> TokenLayout | None:
    """FLUX.2: as FLUX; while references are being kept they stand before the image, and once they are, as keys alone."""
    mode = inputs.get("kv_cache_mode")
    words = text(inputs["encoder_hidden_states"].shape[1])
    if mode == "cached" and inputs.get("kv_cache") is not None:
        shapes = rasters(inputs["img_ids"], first=1)
        kept = int(inputs["kv_cache"].num_ref_tokens)
        return layout(words, references((kept,)), grid(*shapes[0])) if shapes is not None and len(shapes) == 1 else None
    if mode != "extract" or not inputs.get("num_ref_tokens"):
        return text_then_ids(model, inputs)
    shapes = rasters(inputs["img_ids"], first=1)
    before = inputs["num_ref_tokens"]
    if shapes is None or sum(height * width for height, width in shapes[:-1]) != before:
        return None
    return layout(words, references(*shapes[:-1]), grid(*shapes[-1]))


def flux3(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text, image, references; the references have ids of their own."""
    image, given = rasters(inputs["img_ids"], first=1), inputs.get("image_cond_ids")
    others = [] if given is None else rasters(given, first=1)
    if image is None or others is None or len(image) != 1:
        return None
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(*image[0]), references(*others))


def krea2(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text, then the image; one list of positions for both."""
    words = inputs["encoder_hidden_states"].shape[1]
    shapes = rasters(inputs["position_ids"][words:], first=1)
    return None if shapes is None or len(shapes) != 1 else layout(text(words), grid(*shapes[0]))


_IDEOGRAM_IMAGE, _IDEOGRAM_TEXT = 2, 3


def ideogram4(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Padding, text, image, by the role of each token."""
    roles = inputs["indicator"]
    refuse_mixed_rows(roles)
    refuse_mixed_rows(inputs["position_ids"])
    image = int((roles[0] == _IDEOGRAM_IMAGE).sum())
    words, length = int((roles[0] == _IDEOGRAM_TEXT).sum()), roles.shape[1]
    before = length - image - words
    expected = torch.tensor([0] * before + [_IDEOGRAM_TEXT] * words + [_IDEOGRAM_IMAGE] * image, device=roles.device)
    shapes = rasters(inputs["position_ids"][0, length - image :], first=1)
    if not torch.equal(roles[0], expected) or shapes is None or len(shapes) != 1:
        return None
    padding = [Segment("padding", (before,))] if before else []
    return layout(padding, text(words), grid(*shapes[0]))


def qwen_image(model: Any, inputs: Inputs) -> TokenLayout:
    """Text, then the image, then (Edit) reference images; their shapes come as numbers."""
    refuse_mixed(inputs["img_shapes"])
    shapes = inputs["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    return layout(text(inputs["encoder_hidden_states"].shape[1]), grid(*shapes[0]), references(*shapes[1:]))


def qwen_image21(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text with condition images in their places, the image last; only the image's tokens ask of everything."""
    slots, shapes = inputs["img_mask"][0].tolist(), [tuple(shape) for shape in inputs["img_shapes"][0]]
    parts: list[list[Segment]] = []
    at = 0
    for number, shape in enumerate(shapes):
        begin = slots.index(True, at)
        wide = math.prod(shape) // 4  # a slot of the text stands for four tokens of an image
        if math.prod(shape) % 4 or not all(slots[begin : begin + wide]):
            return None
        parts += [text(begin - at), grid(*shape) if number == len(shapes) - 1 else references(shape)]
        at = begin + wide
    return layout(*parts) if at == len(slots) else None


def ernie_image(model: Any, inputs: Inputs) -> TokenLayout:
    """The image, then text; a key mask hides the padding of shorter texts."""
    height, width = (n // model.config.patch_size for n in inputs["hidden_states"].shape[-2:])
    return layout(grid(height, width), text(inputs["text_bth"].shape[1]))


def nucleus(model: Any, inputs: Inputs) -> TokenLayout:
    """The image, packed, then text that is keys alone."""
    shape = inputs["img_shapes"][0]
    shape = shape[0] if isinstance(shape, list) else shape
    return layout(grid(*shape), text(inputs["encoder_hidden_states"].shape[1]))


def joy_image_plus(model: Any, inputs: Inputs) -> TokenLayout | None:
    """The image, references, padding, then text; none when the samples' shapes differ."""
    listed = [[tuple(shape) for shape in shapes] for shapes in inputs["shape_list"]]
    if any(shapes != listed[0] for shapes in listed):
        return None
    first, *others = listed[0]
    fill = inputs["hidden_states"].shape[1] - sum(math.prod(shape) for shape in listed[0])
    # without a mask the padding is seen like anything else
    kind = "padding" if inputs.get("encoder_hidden_states_mask") is not None else "register"
    padding = [Segment(kind, (fill,))] if fill else []  # type: ignore[arg-type]
    return layout(grid(*first), references(*others), padding, text(inputs["encoder_hidden_states"].shape[1]))


def _by_ids(name: str, model: str, cfg: str | None, note: str = "") -> Family:
    return Family(
        name,
        (model,),
        _FLUX_STACKS,
        text_then_ids,
        (("attn", "joint"),),
        reads_values=("img_ids",),
        cfg=cfg,
        generic=True,
        note=note,
    )


FAMILIES = (
    _by_ids("flux", "FluxTransformer2DModel", "two_pass"),
    _by_ids(
        "chroma",
        "ChromaTransformer2DModel",
        "two_pass",
        "the stock pipeline's mask is a float product, which adds 1 between valid tokens: a bias, so it stays dense",
    ),
    _by_ids("bria", "BriaTransformer2DModel", "batched"),
    _by_ids("bria-fibo", "BriaFiboTransformer2DModel", "batched"),
    _by_ids("ovis-image", "OvisImageTransformer2DModel", None),
    _by_ids("longcat-image", "LongCatImageTransformer2DModel", "two_pass"),
    Family(
        "flux2",
        ("Flux2Transformer2DModel",),
        _FLUX_STACKS,
        flux2,
        kinds=(("attn", "joint"),),
        reads_values=("img_ids", "kv_cache"),
        cfg="two_pass",
        queries=("text", "grid"),
        generic=True,
        note="references see only themselves while their keys are being kept: that call stays dense",
    ),
    Family(
        "flux3",
        ("Flux3Transformer2DModel",),
        ("mode_blocks.image", "single_transformer_blocks"),
        flux3,
        kinds=((r"single_transformer_blocks\.\d+\.attn", "joint"), ("attn", "self")),
        reads_values=("img_ids", "image_cond_ids"),
        generic=True,
    ),
    Family(
        "krea2",
        ("Krea2Transformer2DModel",),
        ("transformer_blocks",),
        krea2,
        kinds=(("attn", "joint"),),
        reads_values=("position_ids",),
        cfg="two_pass",
        generic=True,
    ),
    Family(
        "ideogram4",
        ("Ideogram4Transformer2DModel",),
        ("layers",),
        ideogram4,
        kinds=(("attention", "joint"),),
        rising=True,
        reads_values=("position_ids", "indicator"),
        lists=("hidden_states", "indicator", "position_ids"),
        generic=True,
        note="its second denoiser, for the negative pass, has the image alone",
    ),
    Family(
        "qwen-image",
        ("QwenImageTransformer2DModel",),
        ("transformer_blocks",),
        qwen_image,
        kinds=(("attn", "joint"),),
        lists=("img_shapes",),
    ),
    Family(
        "qwen-image-2.1",
        ("QwenImage21Transformer2DModel",),
        ("transformer_blocks",),
        qwen_image21,
        kinds=(("attn", "joint"),),
        reads_values=("img_mask",),
        queries=("grid",),
        note="text and condition images look only at what stands before them: those calls stay dense",
    ),
    Family(
        "ernie-image",
        ("ErnieImageTransformer2DModel",),
        ("layers",),
        ernie_image,
        kinds=(("self_attention", "joint"),),
        cfg="batched",
    ),
    Family(
        "nucleus-moe",
        ("NucleusMoEImageTransformer2DModel",),
        ("transformer_blocks",),
        nucleus,
        kinds=(("attn", "joint"),),
        queries=("grid",),
    ),
    Family(
        "joy-image-plus",
        ("JoyImageEditPlusTransformer3DModel",),
        ("double_blocks",),
        joy_image_plus,
        kinds=(("attn", "joint"),),
        cfg="two_pass",
    ),
)
