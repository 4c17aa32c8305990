"""Token orders against ComfyUI's own models: tiny random ones, in ComfyUI's Python, no server.

COMFYUI_DIR and COMFYUI_PYTHON as for `test_live`.
"""

import math

import pytest
from comfy_scene import LIVE, rows_of

pytestmark = LIVE
FAMILIES = (
    "wan", "wan-in-context", "hunyuan", "flux", "flux-kontext", "chroma", "qwen", "qwen-edit", "krea", "z-image", "ltx",
    "ltx2", "cosmos", "kandinsky", "h3", "flux2", "sd3", "sd35",
)  # fmt: skip


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    return rows_of("comfy_orders.py", *FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_the_models(told: dict[str, dict], family: str) -> None:
    row = told[family]
    if "absent" in row:
        pytest.skip(f"this ComfyUI has no such family: {row['absent']}")
    assert "segments" in row, row.get("why")
    start, text, grid, at = 0, [], [], 0
    for kind, shape, length in row["segments"]:
        if kind == "text":
            text += range(start, start + length)
        if kind == "grid":
            grid, at = shape, start
        start += length
    # learned tokens that fill the text up are refined with it, so a changed text moves all or nothing of that part
    assert set(row["text"]) <= set(text)
    assert bool(row["text"]) == bool(text)
    patch = [-(-n // tokens) for n, tokens in zip(row["latents"][-len(grid) :], grid)]
    for place, moved in zip(row["places"], row["moved"]):
        cell = [n // p for n, p in zip(place[-len(grid) :], patch)]
        index = sum(n * math.prod(grid[axis + 1 :]) for axis, n in enumerate(cell))
        assert moved == at + index, f"latent {place} is token {moved}, not {at + index}"
