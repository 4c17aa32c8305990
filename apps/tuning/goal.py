"""What `genattn tune` looks for, and the choice among what was measured: pure functions of the figures.

nearness   o dense
           |   o---.            the front: no other setting is both faster and nearer to dense
           |        o---.
           |     x       o      x: beaten
           +------------------> times as fast
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genattn.errors import GenAttnError

# what one prompt cannot tell apart: measured seconds and PSNR move about by so much between prompts
FASTER, NEARER_DB = 1.05, 1.0
HOPELESS_SPEED, HOPELESS_DB = 0.75, 6.0
_SKIPS = 0.97  # a share of the scores above it is dense attention under another name


@dataclass(frozen=True)
class Goal:
    """What the settings must reach; at least one is needed.

    budget: times as fast as dense, the whole call, >= 1. min_psnr: dB against the dense clip, >= 0. min_oracle: share of what
    was asked that the tiny world's oracle finds, in (0, 1].
    """

    budget: float | None = None
    min_psnr: float | None = None
    min_oracle: float | None = None

    def __post_init__(self) -> None:
        if self.budget is None and self.min_psnr is None and self.min_oracle is None:
            raise GenAttnError("tune needs a goal; give --budget 2x, --min-psnr 30 or --min-oracle 0.9")
        if self.budget is not None and not 1 <= self.budget < math.inf:
            raise GenAttnError(f"--budget must be a number of times as fast as dense, at least 1x, got {self.budget:g}x")
        if self.min_psnr is not None and not 0 <= self.min_psnr < math.inf:
            raise GenAttnError(f"--min-psnr must be a number of dB >= 0, got {self.min_psnr:g}; 30 is near, 25 is visible")
        if self.min_oracle is not None and not 0 < self.min_oracle <= 1:
            raise GenAttnError(f"--min-oracle must be a share in (0, 1], got {self.min_oracle:g}")

    def __str__(self) -> str:
        words = [
            "" if self.budget is None else f"{self.budget:g} times as fast",
            "" if self.min_psnr is None else f"{self.min_psnr:g} dB",
            "" if self.min_oracle is None else f"{self.min_oracle:g} of what was asked",
        ]
        return "at least " + " and ".join(word for word in words if word)


@dataclass(frozen=True)
class Row:
    """One setting over its prompts: times as fast as dense (median), means of the rest. psnr in dB, worst: its least.

    oracle: None where the oracle cannot judge.
    """

    name: str
    prompts: int
    seconds: float
    speedup: float
    density: float
    psnr: float
    worst: float
    ssim: float
    oracle: float | None = None
    peak_memory_gb: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, rounded; an infinite PSNR (equal to dense) is None."""
        found = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return found | {name: None for name in ("psnr", "worst") if math.isinf(found[name])}


def parse_budget(text: str) -> float:
    """`2x`, `1.5` or `1.5 x` as a number. Raises GenAttnError for anything else."""
    found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*x?\s*", text, re.IGNORECASE)
    if found is None:
        raise GenAttnError(f"--budget must be a number of times as fast as dense, such as 2x, got {text!r}")
    return float(found[1])


def summed(samples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row per setting of the journal's samples, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["setting"], []).append(sample)
    return [_row(name, found) for name, found in groups.items()]


def _row(name: str, found: Sequence[Mapping[str, Any]]) -> Row:
    judged = [s["oracle"] for s in found if s["oracle"] is not None]
    return Row(
        name,
        len(found),
        statistics.fmean(s["seconds"] for s in found),
        statistics.median(s["speedup"] for s in found),
        statistics.fmean(s["density"] for s in found),
        statistics.fmean(s["psnr"] for s in found),
        min(s["psnr"] for s in found),
        statistics.fmean(s["ssim"] for s in found),
        statistics.fmean(judged) if judged else None,
        max(s["peak_memory_gb"] for s in found),
    )


def choose(rows: Sequence[Row], goal: Goal) -> Row | None:
    """The setting to keep: of those that reach the goal and are faster than dense the fastest, or, where the goal is speed
    alone, the nearest to dense. None when there is none.
    """
    able = [row for row in rows if row.speedup > 1 and _reaches(row, goal)]
    if goal.min_psnr is None and goal.min_oracle is None:
        return max(able, key=lambda row: (row.psnr, row.speedup, row.name), default=None)
    return max(able, key=lambda row: (row.speedup, row.psnr, row.name), default=None)


def _reaches(row: Row, goal: Goal) -> bool:
    oracle = -1.0 if row.oracle is None else row.oracle
    return row.density < _SKIPS and (
        row.speedup >= (goal.budget or 0)
        and row.psnr >= (goal.min_psnr or 0)
        and (not goal.min_oracle or oracle >= goal.min_oracle)
    )


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other row beats in both speed and PSNR, slowest first; of equals the first by name."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.speedup, -row.psnr, row.name)):
        if not kept or row.psnr > kept[-1].psnr:
            kept.append(row)
    return kept[::-1]


def still_running(rows: Sequence[Row]) -> list[Row]:
    """The rows that are worth another prompt: another is clearly faster and clearly nearer to dense than those that fall out.

    What skips nothing at this size falls out too. Dense itself stands among the others: 1 times as fast, and equal to dense. A
    row on the front of the others never falls out, unless it is clearly slower than dense.
    """
    sparse = [row for row in rows if row.density < _SKIPS]
    return [row for row in sparse if row.speedup * FASTER >= 1 and not any(_beats(other, row) for other in sparse)]


def _beats(other: Row, row: Row) -> bool:
    faster = other.speedup >= row.speedup * FASTER
    nearer = other.psnr >= row.psnr + NEARER_DB
    return faster and nearer and (row.oracle is None or other.oracle is None or other.oracle >= row.oracle)


def hopeless(row: Row, goal: Goal) -> bool:
    """Whether one prompt shows that the goal is out of reach: a quarter too slow, or 6 dB too far from dense."""
    slow = goal.budget is not None and row.speedup < HOPELESS_SPEED * goal.budget
    return slow or (goal.min_psnr is not None and row.psnr < goal.min_psnr - HOPELESS_DB)


def nearest_miss(rows: Sequence[Row], goal: Goal) -> str:
    """Why nothing was chosen, in one sentence with the figures that came nearest."""
    faster = [row for row in rows if row.speedup > 1]
    if not faster:
        best = max((row.speedup for row in rows), default=0.0)
        return f"no setting is faster than dense at this size (the best is {best:.2f} times as fast); take a longer clip"
    quick = max(faster, key=lambda row: row.speedup)
    near = max(faster, key=lambda row: row.psnr)
    return (
        f"no setting that is faster than dense reaches {goal}; the fastest is {quick.name} "
        f"({quick.speedup:.2f} times, {quick.psnr:.1f} dB), "
        f"the nearest to dense {near.name} ({near.speedup:.2f} times, {near.psnr:.1f} dB)"
    )
