"""What the papers claim of geometry, measured on our patterns: no weights, no device, seconds.

density     share of the scores that Radial computes, from 11 to 641 frames of 480p
sparsity    the released mask at the shapes of Radial's tables, against the published figures
simulator   NATTENSim's table from our simulator
noise       how far noise levels lie apart within one FIFO window, by the number of partitions

python -m genattn.apps.laboratory.geometry        rewrites assets/bench/{density,sparsity,simulator,noise_span}.csv
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler

from genattn.apps.laboratory.published_shapes import BOUNDS, SPARSITIES
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.radial import RadialPattern
from genattn.planning.scale import radial_density

FOLDER = Path("assets/bench")
FRAMES = (11, 21, 41, 81, 161, 321, 641)
FRAME = (30, 52)


def density_rows() -> list[dict[str, Any]]:
    """Density and tokens per length, for Eq. 4 and for our form of it with the same windows."""
    rows = []
    for variant in ("paper", "genattn"):
        for frames in FRAMES:
            layout = TokenLayout.from_grid((frames, *FRAME))
            tiles = RadialPattern(variant=variant, decay=1.0).plan(layout, 128, 128).density  # type: ignore[arg-type]
            row = {"variant": variant, "frames": frames, "tokens_per_frame": math.prod(FRAME), "tokens": layout.seqlen}
            rows.append(row | {"tile_density": tiles, "token_density": radial_density(frames, math.prod(FRAME))})
    return rows


def sparsity_rows() -> list[dict[str, Any]]:
    """The released code's mask, as it was with the sink, at the published shapes."""
    rows = []
    for case in SPARSITIES:
        plan = RadialPattern(variant="official", decay=1.0).plan(TokenLayout.from_grid(case.grid), 128, 128)
        grid = "x".join(map(str, case.grid))
        rows.append({"case": case.name, "grid": grid, "published": case.percent, "sparsity": 100 * (1 - plan.density)})
    return rows


def simulator_rows() -> list[dict[str, Any]]:
    """Every row of the published table beside ours."""
    rows = []
    for case in BOUNDS:
        found = case.simulate()
        shape = {name: "x".join(map(str, getattr(case, name))) for name in ("grid", "window", "stride")}
        ours = {"worst_tile": found.worst_tile, "flops": found.flops, "end_to_end": found.end_to_end[0]}
        rows.append({"model": case.model, **shape, **ours, "published": case.end_to_end, "b200": case.b200})
    return rows


def noise_rows(window: int = 16) -> list[dict[str, Any]]:
    """Mean and largest span of the noise level inside a window, VideoCrafter's schedule, per number of partitions."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    kept = scheduler.alphas_cumprod.numpy()
    rows = []
    for partitions in (1, 2, 4, 8):
        levels = np.linspace(0, 999, partitions * window).round().astype(int)
        sigma = np.sqrt(1 - kept[levels])
        spans = [np.ptp(sigma[first : first + window]) for first in range(0, len(sigma), window)]
        rows.append({"partitions": partitions, "mean_span": float(np.mean(spans)), "worst_span": float(np.max(spans))})
    return rows


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "density": density_rows,
    "sparsity": sparsity_rows,
    "simulator": simulator_rows,
    "noise_span": noise_rows,
}


def main() -> None:
    """Entry point of `python -m genattn.apps.laboratory.geometry`."""
    facts = provenance("cpu")
    for name, make in TABLES.items():
        rows = [row | facts for row in make()]
        path = FOLDER / f"{name}.csv"
        path.unlink(missing_ok=True)
        append_rows(path, rows)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
