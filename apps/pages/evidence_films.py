"""Findings about Ouroboros over FIFO from the films of assets/bench/long_video_ablation.csv, paired by caption, by model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genattn.apps.pages.evidence_tables import MINIATURE, NOT, Finding, NotMeasuredError, Row, Tables, number

TABLE = "long_video_ablation"
# the paper's four, and what the oracle finds: a score that rises while the subject is lost is no gain
MEASURES = ("subject_consistency", "background_consistency", "motion_smoothness", "temporal_flickering")
ORACLE = "oracle_subject"
_MEMORY = ("+ SACFA", "+ memory frames")  # on a transformer that sees whole windows, memory frames stand for SACFA


@dataclass(frozen=True)
class _Change:
    """What a step of the ablation changes on one model."""

    text: str
    why: str
    rows: tuple[Row, ...]


def ouroboros_over_fifo(tables: Tables) -> Finding:
    """All of it against FIFO: the claim is of every measure."""
    return _finding(tables, ("+ guidance",), ("FIFO",), least=len(MEASURES))


def ouroboros_tail(tables: Tables) -> Finding:
    """The tail alone."""
    return _finding(tables, ("+ tail",), ("FIFO",))


def ouroboros_sacfa(tables: Tables) -> Finding:
    """The memory on top of the tail."""
    return _finding(tables, _MEMORY, ("+ tail",))


def ouroboros_guidance(tables: Tables) -> Finding:
    """The guidance on top of both."""
    return _finding(tables, ("+ guidance",), _MEMORY)


def _finding(tables: Tables, later: Sequence[str], earlier: Sequence[str], least: int = 1) -> Finding:
    """Over every model that has such films; reproduced only if so many measures rise, and none falls, on each of them."""
    rows = tables.rows(TABLE)
    models = dict.fromkeys(row.get("model", "") for row in rows)
    runs = [_last_run([row for row in rows if row.get("model", "") == model]) for model in models]
    changes, missing = [], []
    for run in runs:
        try:
            changes.append(_change(run, later, earlier, least))
        except NotMeasuredError as error:
            missing.append(error)
    if not changes:
        raise missing[0]
    told = "; ".join(change.why for change in changes if change.why)
    text = "; ".join(change.text for change in changes)
    return Finding(text, NOT if told else MINIATURE, told, tuple(row for change in changes for row in change.rows))


def _last_run(rows: Sequence[Row]) -> list[Row]:
    """Films as long and in as many levels as the last: others cannot be compared."""
    return [row for row in rows if all(row.get(mark) == rows[-1].get(mark) for mark in ("frames", "steps"))]


def _change(rows: Sequence[Row], later: Sequence[str], earlier: Sequence[str], least: int) -> _Change:
    """Mean change and 95 % interval of each measure over the captions that both variants have.

    Raises NotMeasuredError for fewer than two of them.
    """
    films = [{row["prompt"]: row for row in rows if row["variant"] in names} for names in (later, earlier)]
    shared = sorted(set(films[0]) & set(films[1]))
    if len(shared) < 2:
        raise NotMeasuredError(f"assets/bench/{TABLE}.csv has fewer than 2 films of both {later[0]!r} and {earlier[0]!r}")
    after, before = ([film[prompt] for prompt in shared] for film in films)
    gains = {name: _gain(after, before, name) for name in (*MEASURES, ORACLE) if after[0].get(name)}
    worse = [name.replace("_", " ") for name in gains if sum(gains[name]) < 0]
    better = [name.replace("_", " ") for name in MEASURES if gains[name][0] > gains[name][1]]
    parts = [f"{name.replace('_', ' ')} {100 * mean:+.2f} ± {100 * half:.2f}" for name, (mean, half) in gains.items()]
    first, base = after[0], after[0].get("base") or "tiny-wan"
    said = f"{first['variant']} minus {before[0]['variant']}"
    text = f"{base}, {first.get('frames', '')} frames, {len(shared)} prompts, {said}, points: {', '.join(parts)}"
    why = f"{', '.join(worse)} fell" if worse else ""
    if not worse and len(better) < least:
        why = f"only {', '.join(better)} rose" if better else f"no interval excludes 0 with {len(shared)} films"
    return _Change(text, f"{base}: {why}" if why else "", (*after, *before))


def _gain(after: Sequence[Row], before: Sequence[Row], name: str) -> tuple[float, float]:
    """Mean change and half its interval."""
    gain = np.array([number(a, name) - number(b, name) for a, b in zip(after, before, strict=True)])
    return float(gain.mean()), 1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5
