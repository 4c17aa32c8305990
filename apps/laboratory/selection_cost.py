"""What choosing tiles costs, beside the attention it saves from.

    python -m genattn.apps.laboratory.selection_cost

share: seconds of the choice over seconds of dense attention at the same length, heads and width (the attention that the choice
saves from); of_saved: over what the sparse call saves. Interleaved, the fastest of a few; rows in assets/bench/selection.csv.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from genattn.apps.laboratory.break_even import fastest
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.functional.planned import plan_for, planned_attention
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.published import sol, sparge, svg2
from genattn.selection.estimate import PooledScore
from genattn.selection.rules import ErrorAware, TopK, TopP
from genattn.selection.tiling import Clusters

GRID = (8, 32, 32)
TABLE = Path("assets/bench/selection.csv")
PATTERNS: dict[str, Pattern] = {
    "top-k": AdaptivePattern(TopK(0.25)),
    "top-p": AdaptivePattern(TopP(0.5)),
    "error-aware": AdaptivePattern(ErrorAware(0.25)),
    "clusters, first": AdaptivePattern(TopK(0.25), PooledScore(0), Clusters(iterations=10)),
    "clusters, later": AdaptivePattern(TopK(0.25), PooledScore(0), Clusters(iterations=2)),
    "top-k, mean": AdaptivePattern(TopK(0.25), tail="mean"),
    "clusters, later, mean": AdaptivePattern(TopK(0.25), PooledScore(0), Clusters(iterations=2), tail="mean"),
    "error-aware, mean2": AdaptivePattern(ErrorAware(0.25), tail="mean2"),
    "sol": sol(),
    "sparge": sparge(),
    "svg2, later": svg2(query_clusters=64, key_clusters=64, iterations=2),
}


def measure(rounds: int = 2, heads: int = 2, dim: int = 64, grid: tuple[int, int, int] = GRID) -> list[dict[str, Any]]:
    """A row per pattern; all calls interleaved with one dense call."""
    layout = TokenLayout.from_grid(grid)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, layout.seqlen, heads, dim, generator=draw) for _ in range(3))
    plans = {name: plan_for(q, k, pattern, layout) for name, pattern in PATTERNS.items()}
    calls: dict[str, Callable[[], Any]] = {
        "dense": partial(F.scaled_dot_product_attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    }
    for name, pattern in PATTERNS.items():
        calls[f"choice {name}"] = partial(plan_for, q, k, pattern, layout)
        calls[f"sparse {name}"] = partial(planned_attention, q, k, v, plans[name])
    found = fastest(calls, rounds)
    return [_row(name, plans[name], found, layout.seqlen, heads, dim) for name in PATTERNS]


def _row(name: str, plan: Any, found: dict[str, float], tokens: int, heads: int, dim: int) -> dict[str, Any]:
    choice, sparse, dense = found[f"choice {name}"], found[f"sparse {name}"], found["dense"]
    return {
        **{"pattern": name, "tokens": tokens, "heads": heads, "head_dim": dim, "density": round(plan.density, 4)},
        **{"choice_seconds": round(choice, 5), "sparse_seconds": round(sparse, 5), "dense_seconds": round(dense, 5)},
        "share": round(choice / dense, 4),
        "of_saved": round(choice / (dense - sparse), 4) if dense > sparse else "",
    }


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved calls of each.")] = 2,
    table: Annotated[Path, typer.Option(help="The file to write anew.")] = TABLE,
) -> None:
    """Measure and write the table."""
    rows = [row | provenance("cpu") for row in measure(rounds)]
    table.unlink(missing_ok=True)
    append_rows(table, rows)
    for row in rows:
        print({name: row[name] for name in ("pattern", "tokens", "density", "share", "of_saved")}, flush=True)


if __name__ == "__main__":
    typer.run(main)
