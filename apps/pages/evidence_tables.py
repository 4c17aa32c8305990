"""What evidence is made of: a claim of a paper, a finding of ours, and the measured tables it is computed from."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from genattn.errors import GenAttnError

Row = dict[str, str]
REPRODUCED, MINIATURE, NOT, NEEDS = (
    "reproduced",
    "reproduced in miniature",
    "not reproduced",
    "needs a GPU or weights not at hand",
)


@dataclass(frozen=True)
class Claim:
    """One headline claim. measure: name of a finding, "test:FILE[::NAME]" (exact by construction), "mini-test:..." or "".

    needs: what is not at hand to measure it as published. command: what makes our counterpart. standing: what of the source
    was not read; empty where its text was. on: the model on which our counterpart was measured, or what stood for one.
    """

    id: str
    method: str
    claim: str
    published: str
    source: str
    measure: str
    needs: str
    command: str
    standing: str = ""
    on: str = ""


@dataclass(frozen=True)
class Finding:
    """What our files say of a claim. measured: figures with interval or spread. verdict: one of the four. rows: behind it."""

    measured: str
    verdict: str
    why: str = ""
    rows: tuple[Row, ...] = ()

    def where(self) -> str:
        """Device and date of the measurement."""
        devices = sorted(
            {row["device"].replace("CPU Intel(R) Xeon(R) Processor", "CPU") for row in self.rows if "device" in row}
        )
        dates = sorted({row["date"] for row in self.rows if row.get("date")})
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
        return f"{', '.join(devices)}, {span}" if devices else ""


class NotMeasuredError(GenAttnError):
    """A table, or rows of one, that a finding needs are not there yet."""


class Tables:
    """The files of assets/bench, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, list[Row]] = {}

    def rows(self, name: str, **wanted: str) -> list[Row]:
        """Rows of NAME.csv whose columns have the wanted values.

        Raises NotMeasuredError when the file or such rows are missing.
        """
        path = self.folder / f"{name}.csv"
        if name not in self._read:
            if not path.is_file():
                raise NotMeasuredError(f"assets/bench/{path.name} is not there yet")
            with path.open(newline="", encoding="utf-8") as file:
                self._read[name] = list(csv.DictReader(file))
        found = [row for row in self._read[name] if all(row.get(k) == v for k, v in wanted.items())]
        if not found:
            told = ", ".join(f"{k} {v}" for k, v in wanted.items())
            raise NotMeasuredError(f"assets/bench/{path.name} has no rows{' with ' + told if told else ''} yet")
        return found

    def newest(self, name: str, *marks: str, **wanted: str) -> list[Row]:
        """Those of `rows` that share the columns `marks` with the last one: the last run."""
        rows = self.rows(name, **wanted)
        return [row for row in rows if all(row.get(mark) == rows[-1].get(mark) for mark in marks)]


def read_claims(path: Path) -> list[Claim]:
    """Every claim in the file's order.

    Raises GenAttnError for a claim without text, source or any way to a verdict, and for one that is there twice.
    """
    claims = [Claim(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    for claim in claims:
        if not (claim.claim and claim.published and claim.source and (claim.measure or claim.needs)):
            raise GenAttnError(f"claim {claim.id} must have text, figure, source, and a measure or what it needs; complete it")
        if claim.measure and not claim.on:
            raise GenAttnError(
                f'claim {claim.id} must say on which model it was measured; add "on", e.g. "tiny-wan" or "geometry"'
            )
    twice = sorted({c.id for c in claims if [d.id for d in claims].count(c.id) > 1})
    if twice:
        raise GenAttnError(f"claims must have ids of their own, got twice: {', '.join(twice)}")
    return claims


def number(row: Row, name: str) -> float:
    """A measured value."""
    return float(row[name])


def between(row: Row, name: str, digits: int = 2) -> str:
    """`mean [low, high]` of a column with an interval."""
    low, high = (f"{float(row[f'{name}_{side}']):.{digits}f}" for side in ("low", "high"))
    return f"{float(row[name]):.{digits}f} [{low}, {high}]"


def bounds(row: Row, name: str) -> tuple[float, float]:
    """The interval of a column."""
    return float(row[f"{name}_low"]), float(row[f"{name}_high"])


def rising(values: Sequence[float], slack: float = 0.0) -> bool:
    """Whether each value is at least the one before, less `slack`."""
    return all(b >= a - slack for a, b in pairwise(values))
