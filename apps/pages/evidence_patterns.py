"""Findings about Radial, neighborhood and content-adaptive attention, computed from measured tables; each gives a verdict."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
    rising,
)
from genattn.patterns.radial import RadialPattern
from genattn.planning.presets import preset

_SWEEP = ("date", "commit", "weights")
# the released mask as it was when the paper was written: with a sink in HunyuanVideo, half a window between Wan's neighbours
_AS_PUBLISHED: dict[str, Any] = {"variant": "official"}


def growth(tokens: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Exponent of values ~ tokens^e by least squares in logarithms, and its standard error; at least 3 points.

    Raises NotMeasuredError for fewer.
    """
    if len(tokens) < 3:
        raise NotMeasuredError(f"an exponent needs at least 3 lengths, got {len(tokens)}")
    x, y = np.log(tokens), np.log(values)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(math.sqrt(covariance[0, 0]))


def fit_n_log_n(tokens: Sequence[float], scores: Sequence[float]) -> float:
    """R squared of scores = a n log2 n + b n."""
    n = np.asarray(tokens, float)
    columns = np.stack([n * np.log2(n), n], 1) / n[-1]
    values = np.asarray(scores, float) / scores[-1]
    solution, *_ = np.linalg.lstsq(columns, values, rcond=None)
    return float(1 - ((columns @ solution - values) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def n_log_n(tables: Tables) -> Finding:
    """Scores against length: by the equation, and as computed in tiles."""
    rows = tables.rows("density")
    parts, good = [], True
    for variant, column, name in (
        ("paper", "token_density", "Eq. 4 by tokens"),
        ("genattn", "tile_density", "ours in tiles of 128"),
        ("paper", "tile_density", "Eq. 4 in tiles of 128"),
    ):
        chosen = [row for row in rows if row["variant"] == variant]
        tokens = [number(row, "tokens") for row in chosen]
        scores = [number(row, column) * n**2 for row, n in zip(chosen, tokens)]
        slope, error = growth(tokens, scores)
        fit = fit_n_log_n(tokens, scores)
        parts.append(f"{name}: n^{slope:.2f} ± {error:.2f}, n log n fit R² {fit:.4f}")
        good = good and (fit > 0.99 or name == "Eq. 4 in tiles of 128")
    why = "" if good else "the fit is poor"
    return Finding("; ".join(parts), REPRODUCED if good else NOT, why, tuple(rows))


def sparsity(tables: Tables) -> Finding:
    """The released mask at the published shapes."""
    rows = tables.rows("sparsity")
    worst = max(abs(number(r, "sparsity") - number(r, "published")) for r in rows)
    parts = [f"{r['case']} {number(r, 'sparsity'):.1f} ({number(r, 'published'):.1f})" for r in rows]
    text = f"{'; '.join(parts)} %; largest difference {worst:.2f} points"
    return Finding(text, REPRODUCED if worst < 0.5 else NOT, "" if worst < 0.5 else "figures differ", tuple(rows))


def radial_pflops(tables: Tables) -> Finding:
    """Arithmetic of the two published runs by our cost model: exact counts, no spread."""
    parts, worst = [], 0.0
    cases = (
        ("hunyuan-video", (30, 48, 80), 612, 339, RadialPattern(**_AS_PUBLISHED, decay=0.95, model="hunyuan", sink=True), 0),
        ("wan-14b", (18, 48, 80), 560, 323, RadialPattern(**_AS_PUBLISHED, decay=0.2, half_window=True), 1),
    )
    for name, grid, dense, sparse, pattern, layers in cases:
        model = preset(name)
        layout = model.layout((grid[1] * 16, grid[2] * 16), (grid[0] - 1) * 4 + 1)
        attention, rest = model.flops(layout)
        density = pattern.plan(layout, 128, 128).density
        share = (1 - 12 / 50) * (1 - layers / model.layers)
        runs = model.passes * 50 / 1e15
        got = (attention + rest) * runs, (rest + attention * (1 - share + share * density)) * runs
        worst = max(worst, abs(got[0] / dense - 1), abs(got[1] / sparse - 1))
        parts.append(f"{name}: {got[0]:.0f} -> {got[1]:.0f} ({dense} -> {sparse})")
    verdict = REPRODUCED if worst < 0.1 else NOT
    why = "" if worst < 0.1 else "our count differs by more than a tenth"
    return Finding(f"{'; '.join(parts)} PFLOPs; largest difference {worst:.0%}; counted, not timed", verdict, why)


def radial_speed(tables: Tables) -> Finding:
    """One attention call on the machine at hand."""
    return _speed(tables, "radial")


def gna_speed(tables: Tables) -> Finding:
    """The same for neighborhood attention."""
    return _speed(tables, "gna")


def _speed(tables: Tables, kind: str) -> Finding:
    rows = [row for row in tables.newest("attention", "date", "commit") if row["case"].startswith(kind)]
    rows = [row for row in rows if row["correct"] == "True"]
    if not rows:
        raise NotMeasuredError(f"assets/bench/attention.csv has no {kind} rows yet")
    best = max(rows, key=lambda row: number(row, "speedup"))
    spread = f"median of rounds {number(best, 'dense_seconds') / number(best, 'median_seconds'):.2f}x"
    text = (
        f"one call, {best['case']}, density {number(best, 'density'):.2f}: {number(best, 'speedup'):.2f}x over the fastest "
        f"dense backend ({spread}), {number(best, 'ratio'):.2f} of what the density promises"
    )
    faster = number(best, "speedup") > 1
    return Finding(text, MINIATURE if faster else NOT, "" if faster else "it is slower here", (best,))


def radial_psnr(tables: Tables) -> Finding:
    """PSNR and SSIM of the default setting on the shipped model."""
    row = tables.rows("compare", attention="radial")[-1]
    text = f"tiny-wan, {row['n']} captions: PSNR {between(row, 'psnr', 1)} dB, SSIM {between(row, 'ssim', 3)}, density "
    return Finding(text + f"{number(row, 'density'):.2f}", MINIATURE if bounds(row, "psnr")[0] > 23 else NOT, "", (row,))


def dense_steps(tables: Tables) -> Finding:
    """PSNR against dense first steps."""
    rows = [row for row in tables.newest("sweep_steps", *_SWEEP) if row["attention"] != "dense"]
    rows.sort(key=lambda row: int(row["attention"]))
    values = [number(row, "psnr") for row in rows]
    text = "; ".join(f"{row['attention']}: {between(row, 'psnr', 1)}" for row in rows)
    good = rising(values, 0.2) and values[-1] > values[0] + 1
    shown = f"tiny-wan, {rows[0]['n']} captions, 50 steps, dB at dense steps {text}"
    return Finding(shown, MINIATURE if good else NOT, "" if good else "it does not rise", tuple(rows))


def output_error(tables: Tables) -> Finding:
    """Relative squared error of single calls, Radial against windows of like density."""
    rows = tables.newest("sweep_error", *_SWEEP, kind="pattern")
    text = "; ".join(f"{r['name']} (density {number(r, 'density'):.2f}) {_quartiles(r)}" for r in rows)
    radial, *others = (number(row, "error") for row in rows)
    good = all(radial < other for other in others)
    shown = f"tiny-wan, mean and quartiles over {rows[0]['calls']} calls: {text}"
    return Finding(shown, MINIATURE if good else NOT, "" if good else "a window is nearer", tuple(rows))


def energy_decay(tables: Tables) -> Finding:
    """Mean attention on a frame by its distance."""
    rows = tables.newest("sweep_error", *_SWEEP, kind="frames apart")
    values = [number(row, "error") for row in rows]
    text = ", ".join(f"{row['name']}: {_quartiles(row)}" for row in rows)
    head = values[: len(values) // 2 + 1]
    falls, up = rising([-v for v in head]), max(values[len(head) :], default=0) > 1.2 * min(values)
    end = "; it rises again for frames that are furthest apart" if up else ""
    shown = f"tiny-wan, share of attention by frames apart, mean and quartiles: {text}{end}"
    return Finding(shown, MINIATURE if falls else NOT, "" if falls else "it does not fall", tuple(rows))


def _quartiles(row: Row) -> str:
    return f"{number(row, 'error'):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"


def _windows(tables: Tables) -> dict[str, Row]:
    return {row["attention"]: row for row in tables.newest("sweep_windows", *_SWEEP)}


def radial_over_window(tables: Tables) -> Finding:
    """PSNR of Radial and of the windows whose density is nearest."""
    rows = _windows(tables)
    radial = rows.pop("radial")
    rows.pop("dense")
    # every window that costs no more counts, the best of them first
    near = [row for row in rows.values() if number(row, "density") <= number(radial, "density") + 0.03]
    near = sorted(near, key=lambda row: -number(row, "psnr"))[:4]
    text = "; ".join(f"{r['attention']} (density {number(r, 'density'):.2f}) {between(r, 'psnr', 1)}" for r in (radial, *near))
    good = all(number(radial, "psnr") > number(row, "psnr") for row in near)
    sure = all(bounds(radial, "psnr")[0] > bounds(row, "psnr")[1] for row in near)
    why = "" if good else "a window that costs no more is as near or nearer"
    note = "" if sure else "; the intervals overlap"
    return Finding(f"tiny-wan, {radial['n']} captions, dB: {text}{note}", MINIATURE if good else NOT, why, (radial, *near))


def stride_quality(tables: Tables) -> Finding:
    """Quality at stride 1, 2 and blocked, window by window."""
    rows = _windows(tables)
    parts, good, used = [], True, []
    for window in dict.fromkeys(name.split()[0] for name in rows if " stride " in name):
        found = [rows[f"{window} stride {label}"] for label in ("1", "2", "window")]
        used += found
        parts.append(f"{window}: {' / '.join(between(row, 'psnr', 1) for row in found)}")
        sliding, strided, blocked = (number(row, "psnr") for row in found)
        good = good and strided >= blocked - 0.5 and strided >= sliding - 3
    text = f"tiny-wan, {used[0]['n']} captions, dB at stride 1 / 2 / blocked: {'; '.join(parts)}"
    return Finding(text, MINIATURE if good else NOT, "" if good else "a stride costs quality here", tuple(used))


def window_quality(tables: Tables) -> Finding:
    """Quality against the share of keys seen."""
    rows = [row for name, row in _windows(tables).items() if name.endswith("stride 1")]
    rows.sort(key=lambda row: math.prod(int(n) for n in row["attention"].split()[0].split("x")))
    text = "; ".join(f"{row['attention'].split()[0]}: {between(row, 'psnr', 1)}" for row in rows)
    good = number(rows[-1], "psnr") > number(rows[0], "psnr")
    note = "" if rising([number(r, "psnr") for r in rows]) else "; the window's shape counts beside its size"
    return Finding(f"tiny-wan, dB, smallest window first: {text}{note}", MINIATURE if good else NOT, "", tuple(rows))


def simulator(tables: Tables) -> Finding:
    """Our simulator against the published table."""
    rows = tables.rows("simulator")
    off = [abs(number(row, "end_to_end") - number(row, "published")) for row in rows]
    text = f"{len(rows)} configurations; difference mean {np.mean(off):.3f}, largest {max(off):.3f}"
    return Finding(text, REPRODUCED if max(off) < 0.02 else NOT, "" if max(off) < 0.02 else "figures differ", tuple(rows))


def perfect_strides(tables: Tables) -> Finding:
    """Configurations whose bound is the whole saving in arithmetic."""
    rows = tables.rows("simulator")
    perfect = [row for row in rows if abs(number(row, "worst_tile") / number(row, "flops") - 1) < 1e-6]
    text = "; ".join(f"{r['model']} {r['window']} stride {r['stride']}: {number(r, 'worst_tile'):.2f}x" for r in perfect)
    good = any(row["stride"] == "16x8x8" for row in perfect) and any(row["stride"] == "16x16" for row in perfect)
    return Finding(f"exact, from geometry: {text}", REPRODUCED if good else NOT, "", tuple(rows))


# ---- tiles chosen by content, stood in for and profiled: assets/bench/adaptive.csv

_MODEL = "tiny-wan"


def _pairs(tables: Tables, first: tuple[str, str], second: tuple[str, str]) -> list[tuple[Row, Row]]:
    """Rows of two (pattern, tail) at equal shares, by rising share. Raises NotMeasuredError where there are none."""
    rows = tables.rows("adaptive", model=_MODEL)
    found = {(r["pattern"], r["tail"], float(r["share"])): r for r in rows if r["error"]}
    shares = sorted({share for _, _, share in found})
    pairs = [(found[(*first, s)], found[(*second, s)]) for s in shares if (*first, s) in found and (*second, s) in found]
    if not pairs:
        raise NotMeasuredError(f"assets/bench/adaptive.csv has no errors of {first} beside {second} yet")
    return pairs


def _errors(pairs: list[tuple[Row, Row]], names: tuple[str, str]) -> str:
    parts = [f"{number(a, 'density'):.2f}: {number(a, 'error'):.3f} and {number(b, 'error'):.3f}" for a, b in pairs]
    return f"error of the attention output by visited share, {names[0]} and {names[1]}: {'; '.join(parts)}"


def _rows(pairs: list[tuple[Row, Row]]) -> tuple[Row, ...]:
    return tuple(row for pair in pairs for row in pair)


def stand_in(tables: Tables) -> Finding:
    """Sol-Attn: means in the place of skipped tiles, same tiles computed."""
    pairs = _pairs(tables, ("top-k", ""), ("top-k", "mean"))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    at = min(pairs, key=lambda p: abs(float(p[0]["share"]) - 0.25))
    text = _errors(pairs, ("dropped", "stood in for"))
    text += f"; PSNR at a share of {float(at[0]['share']):g}: {between(at[0], 'psnr', 1)} and {between(at[1], 'psnr', 1)} dB"
    good = good and bounds(at[1], "psnr")[0] > bounds(at[0], "psnr")[1]
    return Finding(text, MINIATURE if good else NOT, "" if good else "not at every share", _rows(pairs))


def two_means(tables: Tables) -> Finding:
    """This project's own: two means of like keys in place of a skipped tile, for every pattern of the table."""
    rows = [r for r in tables.rows("adaptive", model=_MODEL) if r["tail"] == "mean2" and r.get("tail_gain")]
    if not rows:
        raise NotMeasuredError("assets/bench/adaptive.csv has no rows with two means beside rows without a tail yet")
    rows = sorted(rows, key=lambda r: (float(r["share"]), -number(r, "tail_gain")))
    told = [
        f"{share:g}: " + ", ".join(f"{r['pattern']} +{between(r, 'tail_gain', 1)}" for r in rows if float(r["share"]) == share)
        for share in sorted({float(r["share"]) for r in rows})
    ]
    good = all(bounds(r, "tail_gain")[0] > 0 for r in rows)
    text = f"PSNR to dense against dropping the tiles, dB, paired by caption, by share: {'; '.join(told)}"
    return Finding(text, MINIATURE if good else NOT, "" if good else "not for every pattern and share", tuple(rows))


def error_aware(tables: Tables) -> Finding:
    """SVG-EAR: ranking by what standing in loses against ranking by mass, both stood in for."""
    pairs = _pairs(tables, ("top-k", "mean"), ("error-aware", "mean"))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    why = "" if good else "no lower at every share"
    return Finding(_errors(pairs, ("top-k", "error-aware")), MINIATURE if good else NOT, why, _rows(pairs))


def clusters(tables: Tables) -> Finding:
    """SVG2: clusters of like tokens against boxes of a frame, both dropped as published."""
    pairs = _pairs(tables, ("top-k", ""), ("clusters", ""))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    why = "" if good else "boxes of a frame describe this small model's tokens as well: 512 tokens, 32 clusters"
    return Finding(_errors(pairs, ("boxes", "clusters")), MINIATURE if good else NOT, why, _rows(pairs))


def profiled(tables: Tables) -> Finding:
    """SVOO: a map found on other prompts against a choice in every call."""
    pairs = _pairs(tables, ("top-k", "mean"), ("profiled", "mean"))
    good = all(number(b, "error") <= 1.15 * number(a, "error") for a, b in pairs)
    why = "" if good else "more than 1.15 times the error of choosing in every call"
    return Finding(_errors(pairs, ("chosen in every call", "profiled")), MINIATURE if good else NOT, why, _rows(pairs))


FINDINGS: dict[str, Callable[[Tables], Finding]] = {
    f.__name__: f
    for f in (
        n_log_n, sparsity, radial_pflops, radial_speed, gna_speed, radial_psnr, dense_steps, output_error, energy_decay,
        radial_over_window, stride_quality, window_quality, simulator, perfect_strides, stand_in, two_means, error_aware,
        clusters, profiled,
    )
}  # fmt: skip
