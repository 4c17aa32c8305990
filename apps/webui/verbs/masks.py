"""The app's verb `mask`: a pattern on a shape as pictures, with density and predicted speed; a click picks another token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genattn.apps.sampling.attention_names import pattern_from_name
from genattn.apps.sampling.shapes import parse_shape
from genattn.apps.webui.verbs.limits import whole
from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout

OWN_SHAPE = "own grid"
_MOST_TILES = 4000  # a picture of 4000 x 4000
_SHOWN_FRAMES, _SHEET_WIDTH, _LABEL, _GAP = 24, 1000, 18, 8
_INK, _PAPER = (51, 60, 74), (255, 255, 255)
_HIDDEN, _SEEN, _MARK = (226, 232, 240), (30, 64, 120), (220, 38, 38)
_TILES = np.array([_PAPER, (147, 184, 222), _SEEN], dtype=np.uint8)


@dataclass(frozen=True)
class FrameSheet:
    """Frames of a token grid side by side, each token a square of `scale` pixels: where is which token."""

    grid: tuple[int, int, int]
    shown: tuple[int, ...]

    @classmethod
    def around(cls, grid: tuple[int, int, int], frame: int) -> "FrameSheet":
        """Up to 24 frames evenly spread, `frame` among them."""
        spread = sorted(set(np.linspace(0, grid[0] - 1, min(grid[0], _SHOWN_FRAMES)).round().astype(int).tolist()))
        nearest = min(range(len(spread)), key=lambda i: abs(spread[i] - frame))
        spread[nearest] = frame
        return cls(grid, tuple(spread))

    @property
    def scale(self) -> int:
        """Pixels a token takes."""
        wanted = min(len(self.shown), 4 if len(self.shown) <= 12 else 6)
        return max(1, min(24, (_SHEET_WIDTH // wanted - _GAP) // self.grid[2], 480 // self.grid[1]))

    @property
    def columns(self) -> int:
        """Frames in a row."""
        return max(1, min(len(self.shown), _SHEET_WIDTH // (self.grid[2] * self.scale + _GAP)))

    def corner(self, place: int) -> tuple[int, int]:
        """Left and top pixel of the frame at a place."""
        _, height, width = self.grid
        row, column = divmod(place, self.columns)
        return column * (width * self.scale + _GAP), row * (height * self.scale + _GAP + _LABEL) + _LABEL

    def token_at(self, x: float, y: float) -> tuple[int, int, int]:
        """(frame, row, column) of the token under a click; raises GenAttnError between the frames."""
        for place, frame in enumerate(self.shown):
            left, top = self.corner(place)
            row, column = int((y - top) // self.scale), int((x - left) // self.scale)
            if 0 <= row < self.grid[1] and 0 <= column < self.grid[2]:
                return frame, row, column
        raise GenAttnError("click on a token: every small square of a frame is one")

    def draw(self, seen: np.ndarray, query: Sequence[int]) -> Any:
        """`seen` bool (frames, height, width) as a PIL image, the query in red."""
        from PIL import Image, ImageDraw, ImageFont

        _, height, width = self.grid
        rows = -(-len(self.shown) // self.columns)
        size = (
            self.columns * (width * self.scale + _GAP) - _GAP,
            rows * (height * self.scale + _GAP + _LABEL) - _GAP,
        )
        sheet = Image.new("RGB", size, _PAPER)
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
        for place, frame in enumerate(self.shown):
            left, top = self.corner(place)
            pixels = np.where(seen[frame][..., None], np.array(_SEEN), np.array(_HIDDEN)).astype(np.uint8)
            if frame == query[0]:
                pixels[query[1], query[2]] = _MARK
            big = pixels.repeat(self.scale, 0).repeat(self.scale, 1)
            if self.scale >= 6:  # a hair between tokens
                big[:: self.scale], big[:, :: self.scale] = _PAPER, _PAPER
            sheet.paste(Image.fromarray(big), (left, top))
            if frame == query[0] and self.scale < 14:  # one small square is easily overlooked
                middle = (left + (query[2] + 0.5) * self.scale, top + (query[1] + 0.5) * self.scale)
                pen.circle(middle, self.scale / 2 + 7, outline=_MARK, width=2)
            pen.text((left, top - 4), f"frame {frame}", _MARK if frame == query[0] else _INK, font, anchor="ls")
        return sheet


def mask(
    session: Session,
    attention: str = "radial",
    pattern_options: str | None = None,
    grid: str = "8x16x16",
    text_before: int = 0,
    text_after: int = 0,
    query: str | None = None,
    block: int = 128,
    model: str = OWN_SHAPE,
) -> dict[str, Any]:
    """Draw a pattern.

    grid: FRAMESxHEIGHTxWIDTH in tokens. query: the token whose window is drawn, as FxRxC; the middle one by default.
    model: a preset whose arithmetic says what a whole run gains. Returns `window` and `plan` (PIL images), `query` and
    `facts`. Raises GenAttnError for a pattern, shape or token that cannot be, or more tokens than the server draws.
    """
    from genattn.planning.show import visible_from

    pattern = pattern_from_name(attention, pattern_options)
    if pattern is None:
        raise GenAttnError("dense attention has no mask to draw: every token sees every token; choose another")
    layout = TokenLayout.from_grid(
        parse_shape("grid", grid or ""), whole("text before", text_before, 0, 0), whole("text after", text_after, 0, 0)
    )
    session.limits.at_most("tokens", layout.seqlen, session.limits.tokens)
    side = whole("block", block, 16, 128)
    session.limits.at_most("tiles a side", -(-layout.seqlen // side), _MOST_TILES)
    token = read_token(query, layout)
    facts = _facts(pattern, layout, side, model)
    sheet = FrameSheet.around(layout.grid3, token[0])
    return {
        "window": sheet.draw(visible_from(pattern, layout, token), token),
        "plan": _draw_tiles(pattern, layout, side),
        "query": "x".join(map(str, token)),
        "facts": facts,
    }


def read_token(query: str | None, layout: TokenLayout) -> tuple[int, int, int]:
    """A place such as 4x8x8 inside the layout's grid, its middle for none; raises GenAttnError outside."""
    sides = layout.grid3
    if not query or not query.strip():
        return sides[0] // 2, sides[1] // 2, sides[2] // 2
    found = parse_shape("token", query)
    if len(found) != 3 or any(not 0 <= q < n for q, n in zip(found, sides)):
        raise GenAttnError(f"the token must be FRAMExROWxCOLUMN inside {'x'.join(map(str, sides))}, got {query!r}")
    return found[0], found[1], found[2]


def clicked_token(grid: str, query: str | None, x: float, y: float) -> str:
    """The token under a click on the window picture that shows `query`; raises GenAttnError between the frames."""
    layout = TokenLayout.from_grid(parse_shape("grid", grid))
    sheet = FrameSheet.around(layout.grid3, read_token(query, layout)[0])
    return "x".join(map(str, sheet.token_at(x, y)))


def preset_shape(model: str) -> tuple[str, int, int]:
    """Grid, text before and text after of a preset's usual size."""
    from genattn.planning.presets import preset

    known = preset(model)
    grid = known.grid(known.size, known.frames)
    before, after = (known.joint_tokens, 0) if known.text_first else (0, known.joint_tokens)
    return "x".join(map(str, grid)), before, after


def _facts(pattern: Any, layout: TokenLayout, block: int, model: str) -> dict[str, Any]:
    from genattn.geometry.tile_choice import MASK_COST
    from genattn.planning.presets import PRESETS
    from genattn.planning.simulate import end_to_end, simulate_pattern

    cost = simulate_pattern(pattern, layout, block, block)
    # a masked pair of tiles costs a quarter more: the planner's rule
    faster = cost.total_work / (1 + MASK_COST * (1 - cost.mask_free))
    facts: dict[str, Any] = {
        "layout": layout.describe(),
        "tokens": layout.seqlen,
        "density": round(cost.density, 4),
        "mask_free": round(cost.mask_free, 4),
        "attention_speedup": round(faster, 2),
        "worst_tile_bound": round(cost.worst_tile, 2),
        "pattern": repr(pattern),
    }
    if model and model != OWN_SHAPE:
        if model not in PRESETS:
            raise GenAttnError(f"model must be one of {', '.join(PRESETS)}, got {model!r}; choose one or {OWN_SHAPE!r}")
        attention, rest = PRESETS[model].flops(layout)
        share = attention / (attention + rest)
        facts |= {
            "model": model,
            "attention_share": round(share, 3),
            "run_speedup_dense_quarter": round(end_to_end(faster, 0.75 * share), 2),
        }
    return facts


def _draw_tiles(pattern: Any, layout: TokenLayout, block: int) -> Any:
    """The block plan as a PIL image: rows query tiles, columns key tiles; white not visited, light masked, dark full."""
    from PIL import Image

    from genattn.planning.show import plan_codes

    codes = plan_codes(pattern.plan(layout, block, block))
    scale = max(1, min(24, math.ceil(420 / max(codes.shape))))
    pixels = _TILES[codes].repeat(scale, 0).repeat(scale, 1)
    framed = np.full((pixels.shape[0] + 2, pixels.shape[1] + 2, 3), 203, dtype=np.uint8)
    framed[1:-1, 1:-1] = pixels
    return Image.fromarray(framed)
