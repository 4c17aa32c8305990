"""How the cost of attention grows with length: processor seconds of dense, Radial, neighborhood and FIFO from 2k to 64k tokens.

    seconds ~ tokens ** exponent        dense 2; a fixed window, and FIFO (windows one after the other), 1; Radial between

    python -m genattn.apps.laboratory.cost        adds rows to assets/bench/cost_growth.csv; about four minutes

One head of 64, frames of 32 x 32 tokens. Methods are interleaved and processor time is taken, so that a busy machine changes
little. Before it is timed, a sparse result is held against its definition on sampled queries.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.functional.planned import block_plan_for, planned_attention
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.reference.attention import visible_rows
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

TABLE = Path("assets/bench/cost_growth.csv")
FRAME, WINDOW_FRAMES, HEAD_DIM = (32, 32), 8, 64
PATTERNS: dict[str, Pattern] = {
    "radial": RadialPattern(decay=1.0),
    "neighborhood": NeighborhoodPattern((2, 16, 16), stride=(2, 8, 8)),
}


def prepared(method: str, tensors: tuple[torch.Tensor, ...], layout: TokenLayout) -> tuple[Callable[[], Any], float]:
    """A call that does the whole length once, and the share of the scores it computes.

    FIFO: one attention over a window of eight frames for each frame that the film has (per window of the queue).
    """
    query, key, value = tensors
    first_q, first_k, first_v = (t.transpose(1, 2) for t in tensors)
    if method == "dense":
        return lambda: F.scaled_dot_product_attention(first_q, first_k, first_v), 1.0
    if method == "fifo":
        window = WINDOW_FRAMES * FRAME[0] * FRAME[1]
        q, k, v = (torch.randn(1, 1, window, HEAD_DIM) for _ in range(3))
        frames = layout.grid3[0]
        return lambda: [F.scaled_dot_product_attention(q, k, v) for _ in range(frames)], frames * window**2 / layout.seqlen**2
    plan = block_plan_for(query, key, PATTERNS[method], layout)
    _check(method, tensors, layout)
    return lambda: planned_attention(query, key, value, plan), plan.density


def _check(method: str, tensors: tuple[torch.Tensor, ...], layout: TokenLayout) -> None:
    """Raise GenAttnError when sampled rows differ from the definition: a wrong result gets no time."""
    query, key, value = tensors
    plan = block_plan_for(query, key, PATTERNS[method], layout)
    rows = torch.randperm(layout.seqlen, generator=torch.Generator().manual_seed(0))[:16]
    shown = visible_rows(plan, rows)
    scores = torch.einsum("qhd,khd->hqk", query[0, rows].double(), key[0].double()) * HEAD_DIM**-0.5
    wanted = scores.masked_fill(~shown.expand_as(scores), float("-inf")).softmax(-1) @ value[0].double().transpose(0, 1)
    got = planned_attention(query, key, value, plan)
    assert isinstance(got, torch.Tensor)
    error = float((got[0, rows].transpose(0, 1) - wanted).abs().max())
    if error > 1e-4:
        raise GenAttnError(f"{method} must agree with its definition before it is timed, got an error of {error:.1e}")


def measure(frames: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row per method and length; seconds is the fastest of `rounds` interleaved calls."""
    rows = []
    for count in frames:
        layout = TokenLayout.from_grid((count, *FRAME))
        draw = torch.Generator().manual_seed(0)
        tensors = tuple(torch.randn(1, layout.seqlen, 1, HEAD_DIM, generator=draw) for _ in range(3))
        calls = {name: prepared(name, tensors, layout) for name in ("dense", *PATTERNS, "fifo")}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, (call, _density) in calls.items():
                began = time.process_time()
                call()
                times[name].append(time.process_time() - began)
        for name, (_call, density) in calls.items():
            row = {"method": name, "tokens": layout.seqlen, "density": round(density, 5), "seconds": min(times[name])}
            rows.append(row | {"slowest": max(times[name]), "rounds": rounds})
            print(rows[-1], flush=True)
    return rows


def main(
    longest: Annotated[int, typer.Option(help="Frames of 1024 tokens in the longest sequence.")] = 64,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 2,
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Measure and append the rows."""
    frames = tuple(n for n in (2, 4, 8, 16, 32, 64) if n <= longest)
    facts = provenance("cpu")
    append_rows(table, [row | facts for row in measure(frames, rounds)])


if __name__ == "__main__":
    typer.run(main)
