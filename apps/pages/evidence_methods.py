"""Findings about guidance, endless video and longer training, computed from measured tables; pure functions."""

import re
from collections.abc import Callable
from itertools import pairwise

from genattn.apps.pages.evidence_films import ouroboros_guidance, ouroboros_over_fifo, ouroboros_sacfa, ouroboros_tail
from genattn.apps.pages.evidence_patterns import growth
from genattn.apps.pages.evidence_tables import (
    MINIATURE,
    NOT,
    REPRODUCED,
    Finding,
    NotMeasuredError,
    Row,
    Tables,
    between,
    bounds,
    number,
)

# ---- HeadHunter and SoftPAG, judged by the oracle on tiny-sd3


def _condition(tables: Tables, *names: str) -> list[Row]:
    newest = tables.newest("softpag", "date", "commit")
    rows = [next((r for r in newest if re.fullmatch(name, r["condition"])), None) for name in names]
    missing = [name for name, row in zip(names, rows) if row is None]
    if missing:
        raise NotMeasuredError(f"assets/bench/softpag.csv has no condition {', '.join(missing)} yet")
    return [row for row in rows if row is not None]


def _score(row: Row) -> str:
    return f"{row['condition']} {number(row, 'mean'):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"


def _gain(row: Row, against: str) -> tuple[str, float, float]:
    low, high = float(row["minus_low"]), float(row["minus_high"])
    return f"hunted minus {against} {number(row, 'hunted_minus'):+.3f} [{low:+.3f}, {high:+.3f}]", low, high


def _hunted_over(tables: Tables, name: str, against: str, no_worse: bool = False) -> Finding:
    hunted, other = _condition(tables, "hunted", name)
    text, low, high = _gain(other, against)
    shown = f"tiny-sd3, oracle, {hunted['captions']} unseen captions: {_score(hunted)}, {_score(other)}; {text}"
    good = high > 0 if no_worse else low > 0
    why = "" if good else "it is worse here" if high < 0 else "the interval holds 0: not decided by so many captions"
    return Finding(shown, MINIATURE if good else NOT, why, (hunted, other))


def hunted_over_unguided(tables: Tables) -> Finding:
    """Hunted heads against no guidance."""
    return _hunted_over(tables, "unguided", "no guidance")


def transfer(tables: Tables) -> Finding:
    """Hunted heads against random sets of the same size, on captions the hunt has not seen."""
    return _hunted_over(tables, "random sets", "random heads")


def heads_over_layer(tables: Tables) -> Finding:
    """Hunted heads match or beat the best whole layer."""
    return _hunted_over(tables, r"layer L\d+", "the best layer", no_worse=True)


def hunted_with_cfg(tables: Tables) -> Finding:
    """Hunted heads with CFG against CFG alone."""
    both, cfg = _condition(tables, r"hunted \+ cfg", "cfg")
    sure = float(both["low"]) > float(cfg["high"])
    better = number(both, "mean") > number(cfg, "mean")
    why = "" if sure else "the intervals overlap: not decided" if better else "CFG alone is as good here"
    text = f"tiny-sd3, oracle, {both['captions']} unseen captions: {_score(both)}, {_score(cfg)}"
    return Finding(text, MINIATURE if sure else NOT, why, (both, cfg))


def probe_cost(tables: Tables) -> Finding:
    """The cheap probe beside the full search."""
    (row,) = _condition(tables, "probe")
    text = f"our probe orders heads like the full search (rank correlation {number(row, 'rank_correlation'):.2f} over "
    text += f"{row['captions']} heads) at {number(row, 'forwards_ratio'):.1f} times fewer forwards; one hunt, no spread"
    return Finding(text, MINIATURE if number(row, "rank_correlation") > 0.5 else NOT, "", (row,))


def softpag_u(tables: Tables) -> Finding:
    """The score against u."""
    rows = [r for r in tables.newest("softpag", "date", "commit") if re.fullmatch(r"u[ =]*[\d.]+", r["condition"])]
    if not rows:
        raise NotMeasuredError("assets/bench/softpag.csv has no sweep of u yet")
    best = max(rows, key=lambda row: number(row, "mean"))
    inner = not best["condition"].endswith(("1", "1.0"))
    return Finding(
        f"tiny-sd3: {'; '.join(map(_score, rows))}", MINIATURE if inner else NOT, "" if inner else "u = 1 is best", tuple(rows)
    )


# ---- BroadWay


def _broadway(tables: Tables, name: str, column: str) -> Finding:
    return _changed(tables.rows("broadway", variant="both", model="tiny-animatediff")[-1], name, column)


def _changed(row: Row, name: str, column: str) -> Finding:
    low, high = bounds(row, column)
    text = f"{row['model']}, {row['clips']} captions: {name} {number(row, column):.4f}, change "
    text += f"{number(row, f'{column}_change'):+.4f} [{low:+.4f}, {high:+.4f}]"
    why = "" if low > 0 else "it falls here" if high < 0 else "the interval holds 0: not decided by so many clips"
    return Finding(text, MINIATURE if low > 0 else NOT, why, (row,))


def broadway_consistency(tables: Tables) -> Finding:
    """Subject consistency by the oracle."""
    return _broadway(tables, "consistency", "consistency")


def broadway_smoothness(tables: Tables) -> Finding:
    """Motion smoothness."""
    return _broadway(tables, "smoothness", "smoothness")


def broadway_dynamic(tables: Tables) -> Finding:
    """Dynamic degree by optical flow."""
    return _broadway(tables, "dynamic degree", "dynamic_degree")


def broadway_dit(tables: Tables) -> Finding:
    """Dynamic degree of a full-3-D transformer under motion enhancement alone, as published."""
    row = tables.rows("broadway_dit", variant="enhancement", model="tiny-wan")[-1]
    return _changed(row, "enhancement alone, dynamic degree", "dynamic_degree")


def broadway_cost(tables: Tables) -> Finding:
    """Time of whole runs over stock."""
    rows = [row for row in tables.newest("broadway_cost", "date") if row.get("run_overhead")]
    if not rows:
        raise NotMeasuredError("assets/bench/broadway_cost.csv has no whole runs yet")
    parts = [
        f"{row['measured']} {number(row, 'run_overhead'):+.1%} (a guided forward {number(row, 'over_stock') - 1:+.1%})"
        for row in rows
    ]
    good = all(number(row, "run_overhead") < 0.03 for row in rows)
    text = f"whole runs over stock, guided in 20 % of the steps: {'; '.join(parts)}; spread of the machine about 3 %"
    return Finding(text, MINIATURE if good else NOT, "" if good else "it costs more here", tuple(rows))


# ---- FIFO and Ouroboros


def fifo_memory(tables: Tables) -> Finding:
    """Peak memory against the film's length."""
    rows = tables.newest("long_video_memory", "date", "commit")
    parts = [f"{row['frames']} frames {number(row, 'peak_mb'):.1f} MiB" for row in rows]
    peaks = [number(row, "peak_mb") for row in rows]
    grows = max(peaks) / min(peaks) - 1
    text = f"random Wan with streaming decode and H.264 file: {', '.join(parts)}; spread {grows:.1%}"
    return Finding(text, REPRODUCED if grows < 0.02 else NOT, "" if grows < 0.02 else "it grows", tuple(rows))


def fifo_linear(tables: Tables) -> Finding:
    """Exponent of time over length."""
    rows = tables.newest("cost_growth", "date", "commit", method="fifo")
    slope, error = growth([number(r, "tokens") for r in rows], [number(r, "seconds") for r in rows])
    good = abs(slope - 1) < 0.1
    text = f"attention of one window per frame, 2k to 64k tokens: time ~ length^{slope:.2f} ± {error:.2f}"
    return Finding(text, MINIATURE if good else NOT, "" if good else "not linear", tuple(rows))


def noise_span(tables: Tables) -> Finding:
    """Spread of noise levels inside a window."""
    rows = tables.rows("noise_span")
    parts = [f"n = {r['partitions']}: mean {number(r, 'mean_span'):.2f}, worst {number(r, 'worst_span'):.2f}" for r in rows]
    falls = all(number(b, "mean_span") < number(a, "mean_span") for a, b in pairwise(rows))
    return Finding(
        f"VideoCrafter2's schedule, windows of 16: {'; '.join(parts)}", REPRODUCED if falls else NOT, "", tuple(rows)
    )


# ---- longer by fine-tuning


def _lora(tables: Tables, factor: str) -> Finding:
    rows = {row["arm"]: row for row in tables.newest("finetune", "run", factor=factor)}
    missing = {"untuned", "dense LoRA", "radial LoRA"} - set(rows)
    if missing:
        raise NotMeasuredError(f"assets/bench/finetune.csv has no {', '.join(sorted(missing))} at {factor}x yet")
    dense, radial, untuned = rows["dense LoRA"], rows["radial LoRA"], rows["untuned"]
    measures = (("accuracy", 2), ("motion", 2), ("consistency", 2), ("drift", 1))
    parts = [f"{name}: {', '.join(f'{m} {between(row, m, digits)}' for m, digits in measures)}" for name, row in rows.items()]
    training = number(dense, "train_step_seconds") / number(radial, "train_step_seconds")
    sampling = number(untuned, "sample_seconds") / number(radial, "sample_seconds")
    kept = bounds(radial, "accuracy")[1] >= number(dense, "accuracy")
    lifted = bounds(radial, "accuracy")[0] > number(untuned, "accuracy")
    told = f"{radial['clips']} captions, {radial['train_steps']} training steps; {'; '.join(parts)}; "
    told += f"training step {training:.2f}x, sampling {sampling:.2f}x"
    reasons = ["" if lifted else "tuning did not measurably lift accuracy", "" if kept else "Radial LoRA is behind dense LoRA"]
    reasons.append("" if training > 1 and sampling > 1 else "no faster at so few tokens")
    why = "; ".join(filter(None, reasons))
    return Finding(f"tiny-wan at {factor}x length, {told}", NOT if why else MINIATURE, why, tuple(rows.values()))


def lora_2x(tables: Tables) -> Finding:
    """Untuned, dense LoRA and Radial LoRA at twice the length."""
    return _lora(tables, "2")


def lora_4x(tables: Tables) -> Finding:
    """The same at four times."""
    return _lora(tables, "4")


FINDINGS: dict[str, Callable[[Tables], Finding]] = {
    f.__name__: f
    for f in (
        hunted_over_unguided, hunted_with_cfg, transfer, heads_over_layer, probe_cost, softpag_u, broadway_consistency,
        broadway_smoothness, broadway_dynamic, broadway_dit, broadway_cost, fifo_memory, fifo_linear, noise_span,
        ouroboros_over_fifo, ouroboros_tail, ouroboros_sacfa, ouroboros_guidance, lora_2x, lora_4x,
    )
}  # fmt: skip
