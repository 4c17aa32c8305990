"""The layer x head map of the app: drawn by cells of known size, so that a click names a head."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import Head, LayerMap, format_heads, head_name, resolve_heads

_LEFT, _TOP = 46, 26
_INK, _PAPER, _PLAIN, _CHOSEN = (51, 60, 74), (255, 255, 255), (226, 232, 240), (217, 119, 6)
_LOW, _HIGH = np.array([37.0, 99.0, 235.0]), np.array([220.0, 38.0, 38.0])


def cell_size(layers: LayerMap) -> int:
    """Pixels a head takes: large for few heads, small for many."""
    return max(12, min(44, 620 // max(layers.values()), 900 // len(layers)))


def draw_head_map(
    layers: LayerMap, chosen: Mapping[Head, float] | None = None, scores: Mapping[Head, float] | None = None
) -> Any:
    """The map as a PIL image: rows layers, columns heads.

    chosen: framed, with a bar as high as their weight u. scores: blue below 0, white at 0, red above, to the largest one.
    """
    from PIL import Image, ImageDraw, ImageFont

    chosen, scores = chosen or {}, scores or {}
    cell, rows, columns = cell_size(layers), sorted(layers), max(layers.values())
    picture = Image.new("RGB", (_LEFT + columns * cell + 8, _TOP + len(rows) * cell + 8), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=min(13, cell))
    every = 1 if cell >= 20 else 4
    for head in range(0, columns, every):
        pen.text((_LEFT + (head + 0.5) * cell, _TOP - 5), f"H{head}", _INK, font, anchor="ms")
    peak = max((abs(score) for score in scores.values()), default=0.0) or 1.0
    for row, layer in enumerate(rows):
        if row % every == 0:
            pen.text((_LEFT - 8, _TOP + (row + 0.5) * cell), f"L{layer}", _INK, font, anchor="rm")
        for head in range(layers[layer]):
            left, top = _LEFT + head * cell + 1, _TOP + row * cell + 1
            box = (left, top, left + cell - 3, top + cell - 3)
            paint = _colour(scores.get((layer, head)), peak)
            pen.rounded_rectangle(box, cell // 7, fill=paint, outline=_PLAIN)  # so that white is seen
            if (layer, head) in chosen:
                bar = box[3] - round(chosen[layer, head] * (cell - 3))
                pen.rectangle((box[0], bar, box[0] + max(2, cell // 7), box[3]), fill=_CHOSEN)
                pen.rounded_rectangle(box, cell // 7, outline=_CHOSEN, width=max(2, cell // 12))
    return picture


def head_at(x: float, y: float, layers: LayerMap) -> Head:
    """The head under a click at pixel (x, y); raises GenAttnError beside the map."""
    cell, rows = cell_size(layers), sorted(layers)
    row, head = int((y - _TOP) // cell), int((x - _LEFT) // cell)
    if not 0 <= row < len(rows) or not 0 <= head < layers[rows[row]]:
        raise GenAttnError("click on a square of the map: rows are layers, columns heads")
    return rows[row], head


def toggle_head(names: str, head: Head, layers: LayerMap, u: float = 0.5) -> str:
    """`names` with a head added, or taken out if it was there; raises GenAttnError for names that cannot be read."""
    return write_heads(_toggled(read_heads(names, layers, u), head, u), u)


def read_heads(names: str, layers: LayerMap, u: float = 0.5) -> dict[Head, float]:
    """The heads that a text names, none for an empty one; raises GenAttnError as `resolve_heads` does."""
    return resolve_heads(names, layers, u) if names and names.strip() else {}


def write_heads(weights: Mapping[Head, float], u: float) -> str:
    """Names as `read_heads` takes them; a weight is written where it is not u."""
    return ",".join(head_name(head) if weights[head] == u else format_heads({head: weights[head]}) for head in sorted(weights))


def _toggled(weights: Mapping[Head, float], head: Head, u: float) -> dict[Head, float]:
    kept = {known: weight for known, weight in weights.items() if known != head}
    return kept if head in weights else {**kept, head: u}


def _colour(score: float | None, peak: float) -> tuple[int, ...]:
    if score is None:
        return _PLAIN
    end = _HIGH if score > 0 else _LOW
    mixed = 255.0 + (end - 255.0) * min(1.0, abs(score) / peak)
    return tuple(round(float(value)) for value in mixed)
