"""Pictures of a pattern: the token mask, the block plan, and what one query sees drawn on the frames; PNG or terminal.

    draw_pattern(RadialPattern(), TokenLayout.from_grid((8, 8, 8)), path="radial.png")
    print(terminal_pattern(RadialPattern(), TokenLayout.from_grid((8, 8, 8))))

matplotlib is imported when a figure is drawn, never on import.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.patterns.pattern import Pattern
from genattn.whole_file import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["mask", "plan", "window"]
KINDS: tuple[Kind, ...] = ("mask", "plan", "window")
MASK_TOKENS = 2048
MOST_TILES, MOST_TOKENS = 1 << 14, 1 << 26  # on a side of the picture, which is a byte for each pair; of the sequence
_COLOURS = ("#ffffff", "#8fb8de", "#1f4e79")
_MARK = "#d1495b"


def draw_pattern(
    pattern: Pattern,
    layout: TokenLayout,
    path: str | Path | None = None,
    kinds: Sequence[Kind] = KINDS,
    query: Sequence[int] | None = None,
    block: int = 128,
    head: int = 0,
    plan: BlockPlan | None = None,
) -> "Figure":
    """A figure with one panel per kind; saved to `path` (PNG, SVG, PDF by its ending) when given.

    query: grid position (frame, row, column) whose window is drawn; the middle by default. head: for per-head patterns.
    plan: drawn instead of the pattern's own, e.g. a content-adaptive one. Long sequences leave the mask panel out.
    Raises GenAttnError for an unknown kind, a head or a query that does not exist, or without matplotlib.
    """
    _check(kinds, layout, query)
    check_size(layout, block)
    pattern.check(layout)
    kinds = [k for k in kinds if k != "mask" or layout.seqlen <= MASK_TOKENS] or ["plan"]
    figure = new_figure(sum(2 if k == "window" else 1 for k in kinds))
    slots = figure.add_gridspec(1, sum(2 if k == "window" else 1 for k in kinds))
    place = 0
    for kind in kinds:
        wide = 2 if kind == "window" else 1
        slot = slots[0, place : place + wide]
        place += wide
        if kind == "mask":
            _draw_mask(figure.add_subplot(slot), pattern, layout, head)
        elif kind == "plan":
            draw_plan(figure.add_subplot(slot), plan or pattern.plan(layout, block, block), head)
        else:
            draw_window(figure, slot, pattern, layout, query, head)
    figure.suptitle(f"{type(pattern).__name__} on {layout.describe()}", fontsize=9)
    if path is not None:
        save_figure(figure, path, 110)
    return figure


def terminal_pattern(
    pattern: Pattern, layout: TokenLayout, width: int = 64, block: int = 128, head: int = 0, plan: BlockPlan | None = None
) -> str:
    """The block plan as lines of text, rows queries, columns keys: `█` full, `▒` partly visible, `·` nothing.

    width: most characters per line, >= 1; larger plans are merged. The last line says the density.
    """
    if width < 1:
        raise GenAttnError(f"width must be >= 1, got {width}")
    check_size(layout, block)
    pattern.check(layout)
    plan = plan or pattern.plan(layout, block, block)
    codes = plan_codes(plan, _head(plan.num_heads, head))
    rows, columns = (min(n, width) for n in codes.shape)
    edges = [np.arange(n + 1) * size // n for n, size in zip((rows, columns), codes.shape)]
    lines = []
    for top, bottom in zip(edges[0], edges[0][1:]):
        parts = [codes[top:bottom, left:right] for left, right in zip(edges[1], edges[1][1:])]
        lines.append("".join("█" if (p == 2).all() else "▒" if p.any() else "·" for p in parts))
    size = f"{codes.shape[0]} x {codes.shape[1]} tiles"
    return "\n".join([*lines, f"density {plan.density:.3f}, {plan.full_share:.0%} of visited tiles need no mask, {size}"])


def plan_codes(plan: BlockPlan, head: int = 0) -> np.ndarray:
    """Uint8 [NQ, NK]: 0 not visited, 1 partly visible, 2 full. For looking at: one byte per tile pair."""
    codes = np.zeros((plan.query_tiles.shape[0], plan.key_tiles.shape[0]), dtype=np.uint8)
    first, last = int(plan.row_ptr[head, 0]), int(plan.row_ptr[head, -1])
    lengths = plan.row_lengths[head].cpu().numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(last - first) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    full = place < plan.num_full[head].cpu().numpy()[row]
    codes[row, plan.columns[first:last].cpu().numpy()] = 1 + full
    return codes


def visible_from(pattern: Pattern, layout: TokenLayout, query: Sequence[int], head: int = 0) -> np.ndarray:
    """Bool (frames, height, width): grid tokens that the grid token at `query` sees; O(S), for any length."""
    token = layout.grid_positions[int(np.ravel_multi_index(tuple(query), layout.grid3))]
    rule = pattern.rule(layout)
    seen = rule(token[None], torch.arange(layout.seqlen))[_head(rule.num_heads, head)]
    return seen[layout.grid_positions].numpy().reshape(layout.grid3)


def check_size(layout: TokenLayout, block: int) -> None:
    """Raise GenAttnError, before anything is built, for a sequence that no picture can hold in tiles of `block` tokens."""
    tokens, least = layout.seqlen, -(-layout.seqlen // MOST_TILES)
    if tokens > MOST_TOKENS:
        raise GenAttnError(f"a picture must be of at most {MOST_TOKENS:,} tokens, got {tokens:,}; draw a smaller grid")
    if block >= 1 and tokens > MOST_TILES * block:
        raise GenAttnError(
            f"a picture must have at most {MOST_TILES:,} tiles a side, got {tokens:,} tokens in tiles of {block}; "
            f"take tiles of at least {least} tokens, or draw a smaller grid"
        )


def _check(kinds: Sequence[str], layout: TokenLayout, query: Sequence[int] | None) -> None:
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise GenAttnError(f"kinds must be some of {', '.join(KINDS)}, got {list(kinds)}")
    if layout.grid is None:
        raise GenAttnError(f"a picture needs a grid, got the layout {layout.describe()!r}")
    if query is not None and (len(query) != 3 or any(not 0 <= q < n for q, n in zip(query, layout.grid3))):
        raise GenAttnError(f"query must be (frame, row, column) inside {layout.grid3}, got {tuple(query)}")


def _head(heads: int, head: int) -> int:
    if heads > 1 and not 0 <= head < heads:
        raise GenAttnError(f"head must be between 0 and {heads - 1}, got {head}")
    return head if heads > 1 else 0


def new_figure(panels: int) -> "Figure":
    """An empty figure for `panels` panels in a row. Raises GenAttnError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GenAttnError("pictures need matplotlib: pip install matplotlib (or use the terminal rendering)") from error
    return Figure(figsize=(3.4 * panels, 3.7), layout="constrained")


def _draw_mask(axes: Any, pattern: Pattern, layout: TokenLayout, head: int) -> None:
    mask = pattern.mask(layout)
    mask = mask[_head(mask.shape[0], head)] if mask.ndim == 3 else mask
    axes.imshow(mask.numpy(), cmap=_colour_map(_COLOURS[::2]), vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"tokens: {float(mask.float().mean()):.0%} visible", fontsize=8)
    _label(axes, "key token", "query token")


def draw_plan(axes: Any, plan: BlockPlan, head: int = 0) -> None:
    """One panel: tile pairs visited (light: partly visible, dark: full); query tiles without a key in red."""
    codes = plan_codes(plan, _head(plan.num_heads, head))
    axes.imshow(codes, cmap=_colour_map(_COLOURS), vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.set_title(f"tiles of {plan.block_q} x {plan.block_k}: density {plan.density:.3f}", fontsize=8)
    empty = np.flatnonzero(~codes.any(1))
    if empty.size:
        axes.hlines(empty, -0.5, codes.shape[1] - 0.5, colors=_MARK, linewidth=1.2)
        axes.set_title(f"{empty.size} query tiles without a key (red)", fontsize=8)
    _label(axes, "key tile", "query tile")


def draw_window(
    figure: Any, slot: Any, pattern: Pattern, layout: TokenLayout, query: Sequence[int] | None = None, head: int = 0
) -> None:
    """A panel of up to twelve frames into a grid slot of `figure`: what the query (red) sees."""
    frames, height, width = layout.grid3
    query = tuple(n // 2 for n in (frames, height, width)) if query is None else tuple(query)
    seen = visible_from(pattern, layout, query, head)
    shown = sorted({query[0], *np.linspace(0, frames - 1, min(frames, 12)).round().astype(int).tolist()})
    columns = math.ceil(math.sqrt(len(shown) * 2 * height / width)) if len(shown) > 1 else 1
    columns = min(len(shown), max(columns, 3))
    inner = slot.subgridspec(-(-len(shown) // columns), columns, wspace=0.08, hspace=0.25)
    for i, frame in enumerate(shown):
        axes = figure.add_subplot(inner[i // columns, i % columns])
        axes.imshow(seen[frame], cmap=_colour_map(_COLOURS[::2]), vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"frame {frame}", fontsize=6, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        if frame == query[0]:
            axes.plot(query[2], query[1], marker="s", color=_MARK, markersize=4)


def _colour_map(colours: Sequence[str]) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(colours))


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=7)
    axes.set_ylabel(y, fontsize=7)
    axes.tick_params(labelsize=6)
