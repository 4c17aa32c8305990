"""What decayed logits cost in a plan, and how near tiles that straddle frames come to the rule for single frames.

    cost        processor time with the decay over the same plan without, on both CPU paths, in turns; and against the plugin
                LogitDecay without a pattern, which cuts a dense call by frames
    straddle    error of the output against decay frame by frame, and that of no decay at all

    python -m genattn.apps.laboratory.plans.logit_decay cost        (tables prints what stands in docs/long-clip.md)

Random tensors on a CPU. Rows go to assets/bench/logit_decay.csv.
"""

import csv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from genattn.apps.laboratory.sweeps import newest
from genattn.apps.laboratory.tail import taking_turns
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.geometry.frame_decay import windows
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.layouts.site import AttentionSite
from genattn.patterns.combine import Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.long_clip.logit_decay import LogitDecay
from genattn.seam.plugin import AttentionCall, Run

TABLE = Path("assets/bench/logit_decay.csv")
COST: dict[str, Pattern] = {
    "dense": DensePattern(),
    "radial": RadialPattern(tail=None),
    "radial, tail mean": RadialPattern(decay=0.3, tail="mean"),
}
STRADDLE: dict[str, Pattern] = {
    "dense": DensePattern(),
    "window 12x3x3": NeighborhoodPattern((12, 3, 3), tail=None),
    "radial": RadialPattern(decay=0.3, tail=None),
    "radial and a window": Union(RadialPattern(decay=0.3), NeighborhoodPattern((12, 3, 3)), tail=None),
}
# tiles of a frame: 2, less than one, 6
SIZES = (((16, 6, 6), 16), ((16, 6, 6), 64), ((16, 10, 10), 16))


def cost_rows(grid: tuple[int, int, int], dim: int, rounds: int) -> list[dict[str, Any]]:
    """A row per pattern and backend: time over the same plan without a decay, median of the rounds, at twice the trained
    frames."""
    layout, trained, rows = TokenLayout.from_grid(grid), grid[0] // 2, []
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, layout.seqlen, 1, dim, generator=draw) for _ in range(3)]
    shared = {"seqlen": layout.seqlen, "frames": grid[0], "trained": trained, "head_dim": dim, "rounds": rounds}
    for name, pattern in COST.items():
        faded = LogitDecayed(pattern, trained).plan(layout, 128, 128)
        plans = {"without": faded.with_fade(None), "with": faded}
        for impl in ("cpu", "grouped"):
            calls = {key: _call(inputs, plan, impl) for key, plan in plans.items()}
            if name == "dense" and impl == "cpu":
                calls |= {"by frames": _by_frames(inputs, layout, trained), "sdpa": lambda: _sdpa(*inputs)}
            times = taking_turns(calls, rounds)
            for key in [key for key in times if key not in ("without", "sdpa")]:
                base = "without" if key == "with" else "sdpa"
                over = torch.tensor(times[key]) / torch.tensor(times[base])
                row = {"pattern": name, "impl": impl if key == "with" else "LogitDecay", "share": faded.density, "base": base}
                row |= {"over": float(over.median()), "over_best": min(times[key]) / min(times[base])}
                rows.append(row | {"seconds": min(times[key])} | shared)
    return rows


def _call(inputs: list[torch.Tensor], plan: Any, impl: str) -> Any:
    return lambda: block_sparse_attention(inputs[0], inputs[1], inputs[2], plan, impl=impl)


def _sdpa(*inputs: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in inputs)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _by_frames(inputs: list[torch.Tensor], layout: TokenLayout, trained: int) -> Any:
    """The plugin's own answer, without a pattern."""
    plugin, run = LogitDecay(trained), Run(layout=layout)
    site = AttentionSite("", "", 0, 0, "self", 1)
    query, key, value = inputs
    call = AttentionCall(query, key, value, None, None, False, False, site, run, layout)
    return lambda: plugin.attention(call, lambda part: _sdpa(part.query, part.key, part.value))


def straddle_rows(grid: tuple[int, int, int], block: int, trained: int) -> list[dict[str, Any]]:
    """A row per pattern: what the tiles leave of the error that a call without decay would have, in float64."""
    layout, rows = TokenLayout.from_grid(grid), []
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, layout.seqlen, 2, 32, generator=draw, dtype=torch.float64) for _ in range(3))
    query = 2 * query
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    lowered = torch.where(_outside(layout, trained), 0.5 * logits - 0.5, logits)
    for name, pattern in STRADDLE.items():
        faded = LogitDecayed(pattern, trained, 0.5, 0.5).plan(layout, block, block)
        plain = faded.with_fade(None)
        exact = lowered.masked_fill(~visible_mask(plain), -torch.inf).softmax(-1) @ value.transpose(1, 2)
        answers = (reference_attention(query, key, value, plan)[0].transpose(1, 2) for plan in (faded, plain))
        off, without = (float((answer - exact).norm() / exact.norm()) for answer in answers)
        row = {"pattern": name, "tile": block, "frames": grid[0], "trained": trained, "places": grid[1] * grid[2]}
        rows.append(row | {"error": off, "error_without": without})
    return rows


def _outside(layout: TokenLayout, trained: int) -> torch.Tensor:
    """Bool [S, S], by the rule for single frames."""
    frames, height, width = layout.grid3
    frame = layout.raster_index // (height * width)
    first = torch.empty(frames, dtype=torch.int64)
    for start, queries in windows(frames, trained):
        first[queries.start : queries.stop] = start
    low = first[frame][:, None]
    return (frame[None] < low) | (frame[None] >= low + trained)


def tables(path: Path) -> str:
    """What the file has measured last, as the two Markdown tables of docs/long-clip.md."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    straddle, cost = (newest([row for row in rows if row["measured"] == what]) for what in ("straddle", "cost"))
    lines = [_line(["pattern", "tokens of a frame", "tile", "error", "error without decay"]), _line(["---"] + ["---:"] * 4)]
    for row in straddle:
        errors = [f"{float(row[name]):.1%}" for name in ("error", "error_without")]
        lines.append(_line([row["pattern"], row["places"], row["tile"], *errors]))
    first = straddle[0]
    lines += [
        "",
        f"<sub>{first['frames']} frames, trained {first['trained']}, factor .5, penalty .5, random inputs, float64.</sub>",
    ]
    lines += ["", _line(["pattern", "answered by", "share visited", "time", "seconds"]), _line(["---"] * 2 + ["---:"] * 3)]
    for row in cost:
        base = "the same without decay" if row["base"] == "without" else "dense SDPA"
        cells = [row["pattern"], f"`{row['impl']}`", f"{float(row['share']):.2f}", f"{float(row['over']):.2f} x {base}"]
        lines.append(_line([*cells, f"{float(row['seconds']):.2f}"]))
    last = cost[-1]
    told = f"{last['seqlen']} tokens in {last['frames']} frames, trained {last['trained']}, one head of {last['head_dim']}; "
    told += f"processor time, median of {last['rounds']} interleaved rounds. {last['device']}, {last['date']}."
    return "\n".join([*lines, "", f"<sub>{told}</sub>"])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(
    what: Annotated[str, typer.Argument(help="cost, straddle, or tables of what was measured.")],
    rounds: Annotated[int, typer.Option(help="For cost: rounds in turns.")] = 9,
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Run one part and append its rows."""
    if what not in ("cost", "straddle", "tables"):
        raise GenAttnError(f"this measures cost or straddle, or prints tables, got {what!r}")
    if what == "tables":
        print(tables(table))
        return
    rows = cost_rows((32, 16, 16), 64, rounds) if what == "cost" else [row for size in SIZES for row in straddle_rows(*size, 6)]
    facts = provenance("cpu")
    append_rows(table, [{"measured": what} | row | facts for row in rows])
    for row in rows:
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
