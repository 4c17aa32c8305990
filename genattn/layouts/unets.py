"""UNets: every level is a raster of its own, half as high and as wide as the one above."""

from collections.abc import Mapping
from typing import Any

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.family import Family, grid, layout
from genattn.layouts.site import SiteKind

Inputs = Mapping[str, Any]


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


FAMILIES = (
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
