"""The table of what stacks with what, from the rows of `run`."""

import csv
from collections.abc import Sequence
from pathlib import Path

from genattn.errors import GenAttnError

Row = dict[str, str]


def stacking_table(file: Path) -> str:
    """The newest row of every neighbour and method, with the reasons below.

    Raises GenAttnError for a cell that differs from its reference: no page may show that as if it were fine.
    """
    newest = newest_rows(file)
    names = list(dict.fromkeys(name for name, _ in newest))
    methods = list(dict.fromkeys(method for _, method in newest))
    notes: list[str] = []
    body = []
    for name in names:
        rows = [newest.get((name, method)) for method in methods]
        body.append([_label(name, rows), *(_cell(row, notes) for row in rows)])
    below = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    lines = [["beside", *methods], ["---"] * (1 + len(methods)), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{below}\n\n<sub>{_where(list(newest.values()))}</sub>"


def newest_rows(file: Path) -> dict[tuple[str, str], Row]:
    """The last row of each (neighbour, method)."""
    with file.open(newline="") as handle:
        return {(row["neighbour"], row["method"]): row for row in csv.DictReader(handle)}


def _label(name: str, rows: Sequence[Row | None]) -> str:
    row = next(row for row in rows if row is not None)
    return f"{name} ({row['package']} {row['version']})" if row["version"] else name


def _cell(row: Row | None, notes: list[str]) -> str:
    if row is None:
        return "-"
    if row["result"] == "differs":
        told = row["note"] or f"relative error {row['error']}"
        raise GenAttnError(
            f"{row['neighbour']} with {row['method']} must be as its reference, got: {told}; mend it and run again"
        )
    shown = f"within {row['error']}" if row["result"] == "within" else row["result"]
    if not row["note"]:
        return shown
    if row["note"] not in notes:
        notes.append(row["note"])
    return f"{shown} ({notes.index(row['note']) + 1})"


def _where(rows: Sequence[Row]) -> str:
    days = sorted({row["date"] for row in rows})
    last = max(rows, key=lambda row: row["date"])
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"Tiny random Wan, 5 steps, {last['device']}, torch {last['torch_version']}, diffusers {last['diffusers_version']}, "
        f"{when}, commit {last['commit']}."
    )
