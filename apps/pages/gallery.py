"""The pictures and tables of docs/radial.md and docs/neighborhood.md, made from the code.

    python -m genattn.apps.pages.gallery                        in a checkout; or: ... docs assets/figures

Tables stand in the pages between `<!-- table: name -->` and `<!-- end -->`; everything between is replaced.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.geometry.axis_window import AxisWindow
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.patterns.radial_official import official_block_mask
from genattn.planning.show import draw_plan, draw_window, new_figure
from genattn.planning.simulate import simulate

# name, frames, tokens per frame, block, decay, model, sink, half window, published density
DENSITIES = (
    ("Wan script 768x1280x69", 18, 3840, 128, 0.2, "wan", None, False, 0.287),
    ("- before 2025-11-11", 18, 3840, 128, 0.2, "wan", None, True, 0.263),
    ("- decay 1", 18, 3840, 128, 1.0, "wan", None, False, 0.431),
    ("Wan2.2 script 768x1280x77", 20, 3840, 64, 0.8, "wan", None, False, 0.349),
    ("Hunyuan script 768x1280x117", 30, 3840, 128, 0.95, "hunyuan", None, False, 0.275),
    ("Hunyuan 720x1280x253, sink", 64, 3600, 128, 1.0, "hunyuan", True, False, 0.192),
    ("Hunyuan 720x1280x509, sink", 128, 3600, 128, 1.0, "hunyuan", True, False, 0.116),
    ("512x832x81", 21, 1664, 128, 0.2, "wan", None, False, 0.356),
    ("512x512x81", 21, 1024, 128, 0.2, "wan", None, False, 0.455),
    ("480x832x81, ceil form", 21, 1560, 128, 0.2, "wan", None, False, 0.344),
    ("720x1280x81, ceil form", 21, 3600, 128, 0.2, "wan", None, False, 0.265),
)
# name, frames, (height, width) of a frame in tokens, model
HOLES = (
    ("Hunyuan 544x960x125", 32, (34, 60), "hunyuan"),
    ("Wan2.2-5B 704x1280x125", 32, (22, 40), "wan"),
    ("Wan 544x960x61", 16, (34, 60), "wan"),
    ("Wan 416x704x61", 16, (26, 44), "wan"),
    ("Wan 400x640x61", 16, (25, 40), "wan"),
)
# name, attention share, grid, window, tiles, ((stride, published end-to-end by simulation, measured on B200), ...)
SIMULATED = (
    (
        "HunyuanVideo", 0.607, (30, 48, 80), (18, 24, 24), ((4, 8, 8), (2, 8, 8)),
        (
            ((1, 1, 1), 1.73, 1.73), ((2, 1, 1), 1.78, 1.77), ((1, 1, 8), 1.99, 1.95), ((2, 1, 8), 2.02, 1.98),
            ((1, 8, 8), 2.17, 2.09), ((2, 8, 8), 2.20, 2.11), ((16, 8, 8), 2.23, 2.23), ((18, 24, 24), 2.06, 2.00),
        ),
    ),
    (
        "HunyuanVideo", 0.607, (30, 48, 80), (30, 40, 40), ((2, 16, 8), (2, 8, 8)),
        (((1, 1, 1), 1.21, 1.15), ((1, 1, 8), 1.44, 1.26), ((1, 32, 8), 1.55, 1.53), ((30, 40, 40), 1.44, 1.28)),
    ),
    (
        "FLUX 4K", 0.518, (256, 256), (80, 80), ((16, 16), (16, 8)),
        (((1, 1), 1.76, 1.65), ((16, 1), 1.84, 1.72), ((16, 16), 1.88, 1.82)),
    ),
    (
        "Cosmos-7B", 0.587, (16, 44, 80), (16, 24, 16), ((8, 4, 8), (4, 4, 8)),
        (((1, 1, 1), 1.90, 1.76), ((1, 8, 1), 1.96, 1.79), ((1, 1, 16), 2.05, 1.88), ((1, 8, 16), 2.10, 2.05)),
    ),
    (
        "Cosmos-7B", 0.587, (16, 44, 80), (16, 32, 48), ((8, 4, 8), (4, 4, 8)),
        (((1, 1, 1), 1.35, 1.18), ((1, 8, 1), 1.42, 1.20), ((1, 1, 16), 1.42, 1.21), ((1, 8, 16), 1.50, 1.46)),
    ),
)  # fmt: skip


def density_table() -> str:
    """The released Radial code's densities, published and ours, and its blocks without a key."""
    rows = []
    for name, *run, published in DENSITIES:
        mask = official_block_mask(*run)  # type: ignore[arg-type]
        rows.append((name, run[2], run[3], f"{published:.3f}", f"{float(mask.mean()):.3f}"))
    return _table(("shape", "block", "decay", "published", "variant='official'"), rows)


def holes_table() -> str:
    """Query blocks without a single key: the released mask next to ours."""
    rows = []
    for name, frames, grid, model in HOLES:
        mask = official_block_mask(frames, grid[0] * grid[1], 128, 0.2 if model == "wan" else 0.95, model)
        ours = RadialPattern().plan(TokenLayout.from_grid((frames, *grid)))
        rows.append((name, len(mask), int((~mask.any(1)).sum()), int((ours.row_lengths == 0).sum())))
    return _table(("shape", "query blocks", "without a key, official", "without a key, genattn"), rows)


def simulator_table() -> str:
    """End-to-end speed-ups by the worst tile (published and ours) and by total work, and what was measured on a B200."""
    rows = []
    for name, share, grid, window, (tile_q, tile_k), cases in SIMULATED:
        for stride, published, measured in cases:
            got = simulate(grid, window, stride, tile_q=tile_q, tile_k=tile_k, attention_share=share)
            ours = (f"{got.end_to_end[0]:.2f}", f"{got.end_to_end[1]:.2f}", f"{got.mask_free:.0%}")
            rows.append((f"{name} {_x(grid)}", _x(window), _x(stride), f"{published:.2f}", *ours, f"{measured:.2f}"))
    head = ("grid", "window", "stride", "NATTENSim", "worst tile", "total work", "mask-free", "B200")
    return _table(head, rows)


TABLES: dict[str, Callable[[], str]] = {"density": density_table, "holes": holes_table, "simulator": simulator_table}
PAGES = {"radial.md": ("density", "holes"), "neighborhood.md": ("simulator",)}


def fill_tables(page: str, names: Sequence[str]) -> str:
    """`page` with the named tables made anew. Raises GenAttnError if the page lacks one."""
    for name in names:
        slot = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not slot.search(page):
            raise GenAttnError(f"the page has no place for the table {name!r}: <!-- table: {name} --> ... <!-- end -->")
        table = TABLES[name]()
        page = slot.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)  # type: ignore[misc]
    return page


def draw_all(folder: Path) -> list[Path]:
    """Write every picture of the page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "radial_plans.png": _radial_plans(),
        "radial_windows.png": _radial_windows(),
        "radial_holes.png": _radial_holes(),
        "neighborhood_axis.png": _axis_windows(),
        "neighborhood_tiles.png": _tile_shapes(),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=80)
    return [folder / name for name in figures]


def _radial_plans() -> Any:
    layout = TokenLayout.from_grid((21, 30, 52))
    patterns: list[tuple[str, Pattern]] = [
        ("official, decay 0.2", RadialPattern(variant="official")),
        ("paper", RadialPattern(variant="paper")),
        ("genattn, decay 0.5", RadialPattern()),
        ("genattn, decay 0.2", RadialPattern(decay=0.2)),
    ]
    return _plans(patterns, layout)


def _radial_holes() -> Any:
    layout = TokenLayout.from_grid((16, 26, 44))
    return _plans([("official", RadialPattern(variant="official")), ("genattn", RadialPattern(decay=0.2))], layout)


def _tile_shapes() -> Any:
    layout, window = TokenLayout.from_grid((21, 30, 52)), (9, 15, 20)
    patterns: list[tuple[str, Pattern]] = [
        ("raster runs, stride 1", NeighborhoodPattern(window, tile="runs")),
        ("boxes, stride 1", NeighborhoodPattern(window)),
        ("boxes 3x5x4, stride 3x5x4", NeighborhoodPattern(window, (3, 5, 4), tile=(3, 5, 4))),
    ]
    return _plans(patterns, layout, block=64)


def _plans(patterns: Sequence[tuple[str, Pattern]], layout: TokenLayout, block: int = 128) -> Any:
    figure = new_figure(len(patterns))
    slots = figure.add_gridspec(1, len(patterns))
    for i, (name, pattern) in enumerate(patterns):
        axes = figure.add_subplot(slots[0, i])
        draw_plan(axes, pattern.plan(layout, block, block))
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=8)
    return figure


def _radial_windows() -> Any:
    layout = TokenLayout.from_grid((12, 45, 80))
    figure = new_figure(4)
    parts: Any = figure.subfigures(1, 2)
    for part, window in zip(parts, ("strip", "box")):
        part.suptitle(f"window='{window}'", fontsize=8)
        pattern = RadialPattern(window=window)  # type: ignore[arg-type]
        draw_window(part, part.add_gridspec(1, 1)[0, 0], pattern, layout, (3, 22, 40))
    return figure


def _axis_windows() -> Any:
    cases = [
        ("sliding 9", AxisWindow("width", 36, 9)),
        ("window 9, stride 4", AxisWindow("width", 36, 9, 4)),
        ("blocked 9", AxisWindow("width", 36, 9, 9)),
        ("window 5, dilation 3", AxisWindow("width", 36, 5, 1, 3)),
        ("causal 9", AxisWindow("width", 36, 9, causal=True)),
        ("circular 9", AxisWindow("width", 36, 9, circular=True)),
    ]
    figure = new_figure(4)
    for i, (name, axis) in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), i + 1)
        axes.imshow(axis.mask(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _x(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def main(pages: str = "docs", figures: str = "assets/figures") -> None:
    """Rewrite the tables of the pages in the folder `pages` and the pictures in `figures`."""
    for name, tables in PAGES.items():
        page = Path(pages) / name
        page.write_text(fill_tables(page.read_text(), tables))
    for figure in draw_all(Path(figures)):
        print(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
