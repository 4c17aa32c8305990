"""Image transformers."""

from collections.abc import Mapping
from typing import Any

import torch

from genattn.layouts.family import Family, grid, layout, references, text
from genattn.token_layout import TokenLayout


def image_then_text(model: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """SD3: patches of [B, C, H, W], then text."""
    height, width = inputs["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return layout(grid(height // patch, width // patch), text(inputs["encoder_hidden_states"].shape[1]))


def text_then_ids(model: Any, inputs: Mapping[str, Any]) -> TokenLayout | None:
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
    rows, columns = ids[:, first], ids[:, first + 1]
    if ids.shape[0] > 1:
        others = torch.cat([ids[:, :first], ids[:, first + 2 :]], dim=1)
        changes = (others[1:] != others[:-1]).any(dim=1).nonzero().flatten().add(1).tolist()
    else:
        changes = []
    shapes = []
    for begin, end in zip([0, *changes], [*changes, ids.shape[0]]):
        height = int(rows[begin:end].max() - rows[begin:end].min()) + 1
        width = int(columns[begin:end].max() - columns[begin:end].min()) + 1
        if height * width != end - begin:
            return None
        shapes.append((height, width))
    return shapes


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
        ("FluxTransformer2DModel",),
        ("transformer_blocks", "single_transformer_blocks"),
        text_then_ids,
        kinds=(("attn", "joint"),),
        reads_values=("img_ids",),
    ),
)
