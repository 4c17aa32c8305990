"""From how many tokens on sparse attention beats dense attention on this machine's CPU, by backend and share of the scores.

    python -m genattn.apps.laboratory.break_even

Random lists of whole tiles, the tile sizes of `genattn.attention`, the planning left out (static plans are made once). Sparse
and dense calls are interleaved and the fastest of each counts. Rows go to assets/bench/break_even.csv; what they say stands in
genattn/planning/break_even.py, and a test holds the two together.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.functional.dispatch import tile_size
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import run_tiles
from genattn.patterns.listed_plans import plan_of_listed

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHARES = (0.25, 0.5, 0.75)
BACKENDS = ("cpu", "grouped")
HEADS, DIM = 2, 64
TABLE = Path("assets/bench/break_even.csv")


def measure(lengths: tuple[int, ...] = LENGTHS, rounds: int = 5) -> list[dict[str, Any]]:
    """A row per length, share and backend: seconds sparse and dense, and their ratio (above 1 is faster)."""
    return [row for tokens in lengths for share in SHARES for row in _case(tokens, share, rounds)]


def _case(tokens: int, share: float, rounds: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, generator=draw) for _ in range(3))
    block = tile_size(tokens, "cpu")
    tiles = run_tiles(tokens, block)
    listed = torch.rand(HEADS, len(tiles), len(tiles), generator=draw) < share
    plan = plan_of_listed(listed | torch.eye(len(tiles), dtype=torch.bool), tiles, tiles, tokens)
    calls: dict[str, Callable[[], Any]] = {name: partial(block_sparse_attention, q, k, v, plan, impl=name) for name in BACKENDS}
    calls["dense"] = partial(F.scaled_dot_product_attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    found = fastest(calls, rounds)
    return [
        {
            **{"backend": name, "tokens": tokens, "share": share, "density": round(plan.density, 4)},
            **{"heads": HEADS, "head_dim": DIM, "tile": block, "seconds": round(found[name], 6)},
            **{"dense_seconds": round(found["dense"], 6), "speedup": round(found["dense"] / found[name], 3)},
        }
        for name in BACKENDS
    ]


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` interleaved calls, each warmed up once."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def thresholds(rows: list[dict[str, Any]], most: int = 2 * LENGTHS[-1]) -> dict[tuple[str, str], tuple[tuple[float, int], ...]]:
    """Per (device, backend) the smallest length from which all longer ones were no slower, by share; `most` where none was."""
    found: dict[tuple[str, str], tuple[tuple[float, int], ...]] = {}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        marks = []
        for share in sorted({float(row["share"]) for row in rows}):
            mine = sorted(
                (int(r["tokens"]), float(r["speedup"])) for r in rows if r["backend"] == backend and float(r["share"]) == share
            )
            slow = [tokens for tokens, speedup in mine if speedup < 1]
            later = [tokens for tokens, _ in mine if not slow or tokens > max(slow)]
            marks.append((share, min(later) if later else most))
        found["cpu", backend] = tuple(marks)
    return found


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved calls of each.")] = 5,
    table: Annotated[Path, typer.Option(help="The file to write anew.")] = TABLE,
) -> None:
    """Measure and write the table."""
    rows = [row | provenance("cpu") for row in measure(rounds=rounds)]
    table.unlink(missing_ok=True)
    append_rows(table, rows)
    for (device, backend), marks in thresholds(rows).items():
        print(device, backend, marks, flush=True)


if __name__ == "__main__":
    typer.run(main)
