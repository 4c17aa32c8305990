"""Pictures of the sweeps behind the evidence page, one per measured table; where a table is missing its picture is left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genattn.apps.pages.evidence_patterns import growth
from genattn.apps.pages.evidence_tables import NotMeasuredError, Row, Tables, number
from genattn.whole_file import save_figure

_SWEEP = ("date", "commit", "weights")


def _density(axes: Any, tables: Tables) -> None:
    for variant, column, label in (
        ("paper", "token_density", "Eq. 4, by tokens"),
        ("paper", "tile_density", "Eq. 4, tiles of 128"),
        ("genattn", "tile_density", "ours, tiles of 128"),
    ):
        rows = [row for row in tables.rows("density") if row["variant"] == variant]
        axes.loglog([number(r, "frames") for r in rows], [number(r, column) for r in rows], "o-", label=label)
    axes.set(xlabel="latent frames of 30 x 52 tokens", ylabel="share of the scores computed")
    axes.legend()


def _cost(axes: Any, tables: Tables) -> None:
    rows = tables.newest("cost_growth", "date", "commit")
    for name in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == name]
        x, y = [number(r, "tokens") for r in found], [number(r, "seconds") for r in found]
        slope, error = growth(x, y)
        spread = [np.zeros(len(y)), [number(r, "slowest") - v for r, v in zip(found, y)]]
        axes.errorbar(x, y, yerr=spread, fmt="o-", label=f"{name}: exponent {slope:.2f} ± {error:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="processor seconds, one head of 64")
    axes.legend()


def _steps(axes: Any, tables: Tables) -> None:
    rows = [row for row in tables.newest("sweep_steps", *_SWEEP) if row["attention"] != "dense"]
    axes.errorbar(
        [int(r["attention"]) for r in rows], [number(r, "psnr") for r in rows], yerr=_bars(rows), fmt="o-", label="tiny-wan"
    )
    axes.plot((0, 4, 8, 11, 12, 13), (12.8, 18.5, 21.7, 23.2, 23.6, 23.5), "x--", label="paper, Wan2.1-14B")
    axes.set(xlabel="dense first steps of 50", ylabel="PSNR to dense, dB")
    axes.legend()


def _windows(axes: Any, tables: Tables) -> None:
    rows = [row for row in tables.newest("sweep_windows", *_SWEEP) if row["attention"] != "dense"]
    for label in ("stride 1", "stride 2", "stride window", "radial"):
        found = sorted((r for r in rows if r["attention"].endswith(label)), key=lambda r: number(r, "density"))
        x, y = [number(r, "density") for r in found], [number(r, "psnr") for r in found]
        axes.errorbar(x, y, yerr=_bars(found), fmt="o-" if len(found) > 1 else "s", label=label)
    axes.set(xlabel="share of the scores over the run", ylabel="PSNR to dense, dB")
    axes.legend()


def _bars(rows: list[Row]) -> list[list[float]]:
    low = [number(r, "psnr") - float(r["psnr_low"]) for r in rows]
    return [low, [float(r["psnr_high"]) - number(r, "psnr") for r in rows]]


PLOTS: dict[str, tuple[str, Callable[[Any, Tables], None]]] = {
    "evidence_density.png": ("Radial: share of the scores against length; tiles of Eq. 4 hit a floor, ours do not", _density),
    "evidence_cost.png": ("Cost of attention against length on one CPU thread, with fitted exponents", _cost),
    "evidence_steps.png": ("Radial: nearness to dense against the number of dense first steps", _steps),
    "evidence_windows.png": ("Neighborhood attention on tiny-wan: nearness to dense by window and stride", _windows),
}


def plots(tables: Tables) -> list[tuple[str, str, Callable[[Any, Tables], None]]]:
    """(file, caption, draw) of every picture whose table is there."""
    found = []
    for name, (caption, draw) in PLOTS.items():
        try:
            draw(_Blind(), tables)
        except NotMeasuredError:
            continue
        found.append((name, caption, draw))
    return found


class _Blind:
    """Axes that draw nothing: to learn whether a table is there without matplotlib."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def draw_all(tables: Tables, folder: Path) -> list[tuple[str, str]]:
    """Write every picture whose table is there; (file, caption) of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    for name, _, draw in plots(tables):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        draw(figure.subplots(), tables)
        save_figure(figure, folder / name, 110, metadata={"Software": None})
    return [(name, caption) for name, caption, _ in plots(tables)]
