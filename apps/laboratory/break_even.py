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
from genattn.functional.planned import plan_for, planned_attention, tile_size
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import run_tiles
from genattn.patterns.listed_plans import plan_of_listed
from genattn.patterns.pattern import SiteMemory
from genattn.planning.ladder import ADAPTIVE

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHARES = (0.25, 0.5, 0.75)
BACKENDS = ("cpu", "grouped")
HEADS, DIM = 2, 64
TABLE = Path("assets/bench/break_even.csv")


def measure(lengths: tuple[int, ...] = LENGTHS, rounds: int = 12) -> list[dict[str, Any]]:
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
    found = fastest(calls, rounds if tokens <= 2048 else 2)  # long calls are interrupted alike
    return [
        {
            **{"backend": name, "tokens": tokens, "share": share, "density": round(plan.density, 4)},
            **{"heads": HEADS, "head_dim": DIM, "tile": block, "seconds": round(found[name], 6)},
            **{"dense_seconds": round(found["dense"], 6), "speedup": round(found["dense"] / found[name], 3)},
        }
        for name in BACKENDS
    ]


def measure_choice(lengths: tuple[int, ...] = LENGTHS[1:], rounds: int = 12) -> list[dict[str, Any]]:
    """A row per length and backend for the pattern behind "adaptive": its choice, its tail and its attention in one call."""
    return [row for tokens in lengths for row in _choice_case(tokens, rounds)]


def _choice_case(tokens: int, rounds: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(tokens)
    layout = TokenLayout.from_grid((tokens // 256, 16, 16)) if tokens >= 512 else TokenLayout.from_grid((1, 16, tokens // 16))
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, generator=draw) for _ in range(3))
    # later steps start from the centres of the step before
    memory = SiteMemory(0)
    density = plan_for(q, k, ADAPTIVE, layout, memory=memory).density  # type: ignore[union-attr]

    def call(name: str) -> Any:
        memory.step += 1
        return planned_attention(q, k, v, plan_for(q, k, ADAPTIVE, layout, memory=memory), impl=name)

    calls: dict[str, Callable[[], Any]] = {name: partial(call, name) for name in BACKENDS}
    calls["dense"] = partial(F.scaled_dot_product_attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    found = fastest(calls, rounds if tokens <= 2048 else 2)  # long calls are interrupted alike
    return [
        {
            **{"backend": name, "tokens": tokens, "share": "adaptive", "density": round(density, 4)},
            **{"heads": HEADS, "head_dim": DIM, "tile": tile_size(tokens, "cpu"), "seconds": round(found[name], 6)},
            **{"dense_seconds": round(found["dense"], 6), "speedup": round(found["dense"] / found[name], 3)},
        }
        for name in BACKENDS
    ]


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Processor seconds of the fastest of `rounds` interleaved calls, each warmed up once: other work counts for little."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if number:
                best[name] = min(best[name], time.process_time() - begin)
    return best


def thresholds(rows: list[dict[str, Any]], most: int = 2 * LENGTHS[-1]) -> dict[tuple[str, str], tuple[tuple[float, int], ...]]:
    """Per (device, backend) the smallest length from which all longer ones were no slower, by share; `most` where none was."""
    static = [row for row in rows if row["share"] != "adaptive"]
    found: dict[tuple[str, str], tuple[tuple[float, int], ...]] = {}
    for backend in dict.fromkeys(row["backend"] for row in static):
        shares = sorted({float(row["share"]) for row in static})
        mine = {s: [r for r in static if r["backend"] == backend and float(r["share"]) == s] for s in shares}
        found["cpu", backend] = tuple((share, _from_where(mine[share], most)) for share in shares)
    return found


def choice_thresholds(rows: list[dict[str, Any]], most: int = 2 * LENGTHS[-1]) -> dict[tuple[str, str], int]:
    """The same for the pattern behind "adaptive"."""
    chosen = [row for row in rows if row["share"] == "adaptive"]
    backends = dict.fromkeys(row["backend"] for row in chosen)
    return {("cpu", b): _from_where([row for row in chosen if row["backend"] == b], most) for b in backends}


def _from_where(rows: list[dict[str, Any]], most: int) -> int:
    slow = [int(row["tokens"]) for row in rows if float(row["speedup"]) < 1]
    later = [int(row["tokens"]) for row in rows if not slow or int(row["tokens"]) > max(slow)]
    return min(later) if later else most


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved calls of each; two for long ones.")] = 12,
    choice: Annotated[bool, typer.Option(help="Only the pattern that chooses; rows are added.")] = False,
    table: Annotated[Path, typer.Option(help="The file to write anew.")] = TABLE,
) -> None:
    """Measure and write the table."""
    found = [] if choice else measure(rounds=rounds)
    rows = [row | provenance("cpu") for row in [*found, *measure_choice(rounds=rounds)]]
    if not choice:
        table.unlink(missing_ok=True)
    append_rows(table, rows)
    for (device, backend), marks in [*thresholds(rows).items(), *choice_thresholds(rows).items()]:
        print(device, backend, marks, flush=True)


if __name__ == "__main__":
    typer.run(main)
