"""Video transformers."""

from collections.abc import Mapping
from typing import Any

from genattn.layouts.family import Family, grid, layout, patched
from genattn.token_layout import TokenLayout


def wan(model: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """Video only; text comes by cross-attention."""
    return layout(grid(*patched(inputs["hidden_states"], model.config.patch_size)))


FAMILIES = (Family("wan", ("WanTransformer3DModel", "ChronoEditTransformer3DModel"), ("blocks",), wan),)
