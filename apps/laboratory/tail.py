"""What stands in best for skipped tiles: error of the attention output against dense, and videos, on a small trained model.

    error      every self-attention call of three steps, answered under each pattern with each stand-in
    videos     PSNR and SSIM against the dense video, per pattern and tail, on held-out captions
    cost       time with a tail over the same plan without, on both CPU paths, interleaved

    python -m genattn.apps.laboratory.tail error --count 3        (tables prints what stands in docs/tail.md)

Stand-ins: "none" (skipped tiles are dropped), "whole" (no tail, but visited tiles without their element mask), "mean, masked"
(a tail beside masked tiles), "mean", "mean2" (as they ship: visited tiles whole), "variance" (a mean and the second
order of its keys' spread, which did not make it). Rows go to assets/bench/tail.csv.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import genattn
from genattn.apps.laboratory.sweeps import captions, fingerprint, newest
from genattn.apps.sampling.compare import compare
from genattn.apps.sampling.measured_rows import append_rows, provenance, read_rows
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings, call_arguments, open_pipeline
from genattn.errors import GenAttnError
from genattn.functional.planned import block_plan_for
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.random_plan import plan_from_states
from genattn.kernels.plan.tail import TAILS
from genattn.kernels.reference.attention import pseudo_rows, reference_attention, visible_mask
from genattn.kernels.reference.tail import tail_keys, tail_scores
from genattn.layouts.site import AttentionSite
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Union
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.seam.plugin import AttentionCall, Inner, Plugin

TABLE = Path("assets/bench/tail.csv")
STEPS, LOOKED_AT = 12, (2, 6, 10)
WINDOW = NeighborhoodPattern((4, 4, 4))
PATTERNS: dict[str, Pattern] = {
    "radial": RadialPattern(),
    "radial, decay .1, floor 0": RadialPattern(decay=0.1, floor=0),
    "radial paper, decay .5": RadialPattern(variant="paper", decay=0.5),
    "radial official, blocks of 16": RadialPattern(variant="official", block=16),
    "radial official": RadialPattern(variant="official"),
    "window 4x4x4": WINDOW,
    "window 4x4x4, stride 4": NeighborhoodPattern((4, 4, 4), (4, 4, 4)),
    "window 3x3x3": NeighborhoodPattern((3, 3, 3)),
    "window 8x3x3": NeighborhoodPattern((8, 3, 3)),
    "window 6x6x6, stride 2": NeighborhoodPattern((6, 6, 6), (2, 2, 2)),
    "window 4x4x4 + first frame": GlobalTokens(WINDOW, frames=(0,)),
    "window 4x4x4 or radial": Union(WINDOW, RadialPattern(decay=0.1, floor=0)),
    "top-k .5": BlockTopK(0.5),
    "top-k .25": BlockTopK(0.25),
    "top-k .15": BlockTopK(0.15),
}
STAND_INS = ("none", "whole", "mean, masked", *TAILS, "variance")


def stand_in(call: AttentionCall, plan: BlockPlan, name: str) -> torch.Tensor:
    """The answer of `plan`, which has no tail, with one of `STAND_INS`; [B, S, H, D]."""
    whole = plan.seen_whole([True] * plan.num_heads)
    if name == "variance":
        return second_order(call, whole.with_tail("mean"))
    plans = {"none": plan, "whole": whole, "mean, masked": plan.with_tail("mean")}
    tailed = plans[name] if name in plans else whole.with_tail(name)
    return reference_attention(call.query, call.key, call.value, tailed, scale=call.scale)[0]


def second_order(call: AttentionCall, plan: BlockPlan) -> torch.Tensor:
    """A mean per tile whose score gains half the variance of the tile's scores, by channel: for short sequences."""
    if plan.tail is None:
        return reference_attention(call.query, call.key, call.value, plan, scale=call.scale)[0]
    query, key, value = (x.float() for x in (call.query, call.key, call.value))
    scale = call.scale or query.shape[-1] ** -0.5
    keys, squares = (tail_keys(x, value, plan.tail) for x in (key, key.square()))
    spread = (squares.key - keys.key.square()).clamp_min(0.0)
    more = query.square().transpose(1, 2) @ spread.permute(0, 2, 3, 1) * (scale * scale / 2)
    exact = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * scale).masked_fill(~visible_mask(plan), float("-inf"))
    seen = pseudo_rows(plan, torch.arange(plan.seqlen_q))
    stood = (tail_scores(query, keys, scale) + more).masked_fill(~seen, float("-inf"))
    weights = torch.cat([exact, stood], -1).softmax(-1)
    return (weights @ torch.cat([value, keys.value], 1).transpose(1, 2)).transpose(1, 2)


class StandInError(Plugin):
    """Lets every call through and notes, per pattern and stand-in, the relative error of each call: (layer, all heads, [H])."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[int, float, torch.Tensor]]] = defaultdict(list)
        self.share: dict[str, float] = {}
        self.tile = 0

    def wants(self, site: AttentionSite) -> bool:
        """Self-attention over the grid."""
        return site.kind in ("self", "joint")

    @torch.no_grad()
    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The dense answer."""
        out = inner(call)
        if call.layout is None or call.layout.grid is None:
            raise GenAttnError(f"this needs a model whose token grid is known, got none at {call.site.name}")
        if call.run.step in LOOKED_AT:
            for name, pattern in PATTERNS.items():
                plan = block_plan_for(call.query, call.key, pattern.with_tail(None), call.layout)
                self.share[name], self.tile = plan.density, plan.block_k
                for kind in STAND_INS:
                    self.found[name, kind].append((call.site.depth, *_errors(stand_in(call, plan, kind), out)))
        return out


def _errors(got: torch.Tensor, dense: torch.Tensor) -> tuple[float, torch.Tensor]:
    lost, power = ((x.float().square().sum((0, 1, 3))) for x in (got - dense, dense))
    return float((lost.sum() / power.sum()).sqrt()), (lost / power).sqrt()


def error_rows(model: str | None, count: int) -> list[dict[str, Any]]:
    """A row per pattern, stand-in and layer, and one over all layers."""
    settings = SamplingSettings(model, steps=STEPS)
    pipe = open_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    plugin = StandInError()
    with genattn.apply(pipe, plugin):
        for seed, text in enumerate(captions(count)):
            noise = torch.Generator().manual_seed(seed)
            pipe(**call_arguments(pipe, settings), prompt=text, generator=noise, output_type="latent")
    rows = []
    for (name, kind), calls in plugin.found.items():
        none = plugin.found[name, "none"]
        for layer in ("all", *sorted({depth for depth, *_ in calls})):
            some = [i for i, (depth, *_) in enumerate(calls) if layer in ("all", depth)]
            error = torch.tensor([calls[i][1] for i in some])
            worse = error > torch.tensor([none[i][1] for i in some])
            heads = torch.stack([calls[i][2] > none[i][2] for i in some])
            row = {"pattern": name, "share": plugin.share[name], "stand_in": kind, "layer": layer, "error": float(error.mean())}
            row |= {"worse_calls": float(worse.float().mean()), "worse_heads": float(heads.float().mean()), "calls": len(some)}
            rows.append(row | {"tile": plugin.tile, "captions": count, "steps": STEPS})
    return rows


def video_rows(model: str | None, count: int, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """A row per pattern and tail: nearness to the dense video. Schedule: a quarter of the steps and one layer dense."""
    tried = [
        AttentionSettings(f"{name} | {kind}", PATTERNS[name].with_tail(kind), 0.25, 1)
        for name in patterns
        for kind in (None, *TAILS)
    ]
    found = compare(captions(count), tried, SamplingSettings(model, steps=STEPS, device="cpu"))
    rows = []
    for row in found[1:]:
        name, kind = row["attention"].split(" | ")
        kept = {key: row[key] for key in row if key.startswith(("psnr", "ssim"))}
        rows.append({"pattern": name, "share": row["density"], "stand_in": kind, "captions": count, "steps": STEPS, **kept})
    return rows


def cost_rows(seqlen: int, rounds: int) -> list[dict[str, Any]]:
    """A row per head dim, density, backend and tail: time over the same plan without, median of interleaved rounds."""
    rows = []
    tiles = run_tiles(seqlen, 128)
    for dim in (64, 128):
        draw = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, seqlen, 2, dim, generator=draw) for _ in range(3)]
        for density in (0.15, 0.25, 0.5):
            states = 2 * (torch.rand(1, len(tiles), len(tiles), generator=draw) < density).int()
            plan = plan_from_states(states, tiles, tiles, None, seqlen, seqlen)
            plans = {"none": plan} | {kind: plan.with_tail(kind) for kind in TAILS}
            for impl in ("cpu", "grouped"):
                times = taking_turns({kind: _call(inputs, one, impl) for kind, one in plans.items()}, rounds)
                for kind in TAILS:
                    over = torch.tensor(times[kind]) / torch.tensor(times["none"])
                    row = {"stand_in": kind, "impl": impl, "seqlen": seqlen, "heads": 2, "head_dim": dim, "share": plan.density}
                    row |= {"over": float(over.median()), "over_best": min(times[kind]) / min(times["none"]), "tile": 128}
                    rows.append(row | {"seconds": min(times[kind]), "rounds": rounds})
    return rows


def taking_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds per round of each call: what a busy machine takes away does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - started)
    return times


def _call(inputs: list[torch.Tensor], plan: BlockPlan, impl: str) -> Any:
    return lambda: block_sparse_attention(inputs[0], inputs[1], inputs[2], plan, impl=impl)


def error_table(path: Path) -> str:
    """What the file has measured last of errors, as a Markdown table of docs/tail.md."""
    error = newest([row for row in read_rows(path) if row["measured"] == "error" and row["layer"] == "all"])
    header = ["pattern", "share visited", *STAND_INS, "calls worse than none"]
    lines = [_line(header), _line(["---"] + ["---:"] * (len(STAND_INS) + 2))]
    for name in dict.fromkeys(row["pattern"] for row in error):
        some = {row["stand_in"]: row for row in error if row["pattern"] == name}
        cells = [f"{float(some[kind]['error']):.3f}" if kind in some else "-" for kind in STAND_INS]
        worse = " / ".join(f"{float(some[kind]['worse_calls']):.0%}" for kind in ("mean", "mean2"))
        lines.append(_line([name, f"{float(some['none']['share']):.3f}", *cells, worse]))
    return "\n".join(lines)


def cost_table(path: Path) -> str:
    """The same of cost."""
    cost = newest([row for row in read_rows(path) if row["measured"] == "cost"])
    lines = [_line(["backend", "head dim", "share visited", *TAILS]), _line(["---"] + ["---:"] * (len(TAILS) + 2))]
    for case in dict.fromkeys((row["impl"], row["head_dim"], row["share"]) for row in cost):
        some = {row["stand_in"]: row for row in cost if (row["impl"], row["head_dim"], row["share"]) == case}
        cells = [f"{float(some[kind]['over']) - 1:+.1%}" for kind in TAILS]
        lines.append(_line([f"`{case[0]}`", case[1], f"{float(case[2]):.2f}", *cells]))
    first = cost[0]
    told = (
        f"Time over the same plan without a tail, {first['seqlen']} tokens, tiles of {first['tile']}, {first['heads']} heads; "
    )
    told += f"processor time, median of {first['rounds']} interleaved rounds. {first['device']}, {first['date']}."
    return "\n".join([*lines, "", f"<sub>{told}</sub>"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(
    what: Annotated[str, typer.Argument(help="error, videos, cost, or tables of what was measured.")],
    model: Annotated[str | None, typer.Option(help="Folder of a tiny video pipeline; default: the shipped one.")] = None,
    count: Annotated[int, typer.Option(help="Held-out captions.")] = 3,
    pattern: Annotated[list[str] | None, typer.Option(help="For videos: names of patterns; default: all.")] = None,
    seqlen: Annotated[int, typer.Option(help="For cost: tokens.")] = 8192,
    rounds: Annotated[int, typer.Option(help="For cost: interleaved rounds.")] = 9,
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Run one part and append its rows."""
    unknown = sorted(set(pattern or ()) - set(PATTERNS))
    if what not in ("error", "videos", "cost", "tables") or unknown:
        raise GenAttnError(
            f"this measures error, videos or cost of {', '.join(PATTERNS)}, got {what!r}{f' of {unknown}' if unknown else ''}"
        )
    if what == "tables":
        print(error_table(table), cost_table(table), sep="\n\n")
        return
    if what == "cost":
        rows = cost_rows(seqlen, rounds)
    else:
        rows = error_rows(model, count) if what == "error" else video_rows(model, count, pattern or list(PATTERNS))
        rows = [{"weights": fingerprint(model)} | row for row in rows]
    facts = provenance("cpu")
    append_rows(table, [{"measured": what} | row | facts for row in rows])
    for row in rows:
        if row.get("layer", "all") == "all":
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
