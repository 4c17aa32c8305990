"""Pictures of a pair of clips: a film strip with what differs, and which tiles each layer visited."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

STRIP_FRAMES, DIFFERENCE = 8, 4
_INK, _PAPER, _SEEN = (51, 60, 74), (255, 255, 255), np.array([30, 64, 120])
_LEFT, _TOP, _GAP, _LEAST, _MOST = 84, 18, 4, 88, 200
_CELL, _ACROSS = 120, 6


def film_strip(dense: npt.NDArray[np.uint8], sparse: npt.NDArray[np.uint8], name: str) -> Any:
    """Evenly spread frames of two clips uint8 [T, H, W, 3] as a PIL image: dense, sparse, and four times their difference."""
    from PIL import Image, ImageDraw, ImageFont

    places = np.unique(np.linspace(0, len(dense) - 1, min(STRIP_FRAMES, len(dense))).round().astype(int))
    apart = np.abs(dense[places].astype(int) - sparse[places].astype(int)) * DIFFERENCE
    rows = {"dense": dense[places], name: sparse[places], f"difference x{DIFFERENCE}": apart.clip(0, 255).astype(np.uint8)}
    height, width = dense.shape[1:3]
    wide = max(_LEAST, min(_MOST, width))
    high = round(height * wide / width)
    sheet = Image.new("RGB", (_LEFT + len(places) * (wide + _GAP), _TOP + 3 * (high + _GAP)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, place in enumerate(places):
        pen.text((_LEFT + column * (wide + _GAP), 2), f"frame {place}", _INK, font)
    for row, (title, frames) in enumerate(rows.items()):
        top = _TOP + row * (high + _GAP)
        pen.text((0, top + 2), "\n".join(title.split(" ")), _INK, font)
        for column, frame in enumerate(frames):
            look = Image.Resampling.NEAREST if width < wide else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(frame).resize((wide, high), look), (_LEFT + column * (wide + _GAP), top))
    return sheet


def layer_map(visited: Mapping[str, npt.NDArray[np.floating[Any]] | float]) -> Any:
    """A small picture per layer as one PIL image: rows query tiles, columns key tiles, dark where more heads visit.

    visited: layer's name -> share of the heads [query tiles, key tiles], or the share of the scores where tiles have no place.
    """
    from PIL import Image, ImageDraw, ImageFont

    across = min(_ACROSS, max(1, len(visited)))
    rows = -(-len(visited) // across)
    sheet = Image.new("RGB", (across * (_CELL + 2 * _GAP), max(1, rows) * (_CELL + _TOP + 2 * _GAP)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, (name, shares) in enumerate(visited.items()):
        left, top = place % across * (_CELL + 2 * _GAP) + _GAP, place // across * (_CELL + _TOP + 2 * _GAP)
        share = shares if isinstance(shares, float) else float(np.mean(shares))
        pen.text((left, top), f"{name}: {share:.0%}", _INK, font)
        cell = (left, top + _TOP)
        if isinstance(shares, float):
            pen.rectangle((*cell, cell[0] + _CELL, cell[1] + _CELL), outline=_INK)
            pen.text((cell[0] + 8, cell[1] + 42), "tiles by content,\nwithout a place", _INK, font)
        else:
            sheet.paste(Image.fromarray(_inked(_shrunk(shares))).resize((_CELL, _CELL), Image.Resampling.BOX), cell)
            pen.rectangle((*cell, cell[0] + _CELL, cell[1] + _CELL), outline=(203, 203, 203))
    return sheet


def _shrunk(shares: npt.NDArray[np.floating[Any]], most: int = _CELL) -> npt.NDArray[np.floating[Any]]:
    """At most `most` rows and columns: means of blocks, so that single visited tiles of a long sequence stay visible."""
    found = shares
    for axis in (0, 1):
        size = found.shape[axis]
        if size > most:
            edges = np.linspace(0, size, most + 1).round().astype(int)[:-1]
            counts = np.diff([*edges, size])
            found = np.add.reduceat(found, edges, axis) / np.expand_dims(counts, 1 - axis)
    return found


def _inked(shares: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    return (255 - np.clip(shares, 0, 1)[..., None] * (255 - _SEEN)).astype(np.uint8)
