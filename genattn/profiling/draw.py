"""A picture of a profiled map: density per layer and head, expected error, and where the worst heads look.

matplotlib is imported when a figure is drawn, never on import.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from genattn.errors import GenAttnError
from genattn.selection.profile_map import ProfileMap
from genattn.whole_file import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_profile(found: ProfileMap, path: str | Path | None = None, tail: bool = True, worst: int = 3) -> "Figure":
    """Layer x head densities and errors, mean over the run, and the relative maps of the `worst` heads; saved when named.

    tail: whether skipped cells are stood in for. Raises GenAttnError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GenAttnError("drawing a map needs matplotlib; pip install matplotlib") from None
    value, density = "loss" if tail else "mass", found.header.target_density
    shares = found.spread(value, density).mean(-1)
    errors = found.expected_error(value, density).mean(-1).sqrt()
    heads = worst_heads(errors, worst)
    figure = Figure(figsize=(3.2 * (2 + len(heads)), 3.4), layout="constrained")
    axes = figure.subplots(1, 2 + len(heads), squeeze=False)[0]
    for place, title, table in ((axes[0], "share of the scores", shares), (axes[1], "expected error", errors)):
        shown = place.imshow(table.numpy(), aspect="auto", vmin=0)
        place.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(shown, ax=place)
    for place, (layer, head) in zip(axes[2:], heads):
        place.imshow(by_offset(found, value, layer, head).numpy(), aspect="auto")
        rows, columns = found.header.grid[1:]
        place.set(title=f"layer {layer} head {head}", xlabel=f"offset in cells, {rows} x {columns}", ylabel="frames apart")
    figure.suptitle(f"{found.header.model}, {density:.0%} of the scores, {found.header.prompts} prompts")
    if path is not None:
        save_figure(figure, path, 110)
    return figure


def worst_heads(errors: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the largest entries of [layers, heads], largest first."""
    order = errors.flatten().argsort(descending=True)[:count]
    return [divmod(int(i), errors.shape[1]) for i in order]


def by_offset(found: ProfileMap, value: str, layer: int, head: int) -> torch.Tensor:
    """Float32 [frame offsets, row and column offsets side by side]: logarithm of what a head looks at, mean over the run."""
    relative = found.at(value, layer, None)[0][head]
    return relative.flatten(1)
