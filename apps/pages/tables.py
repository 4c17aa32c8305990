"""Markdown tables and the files they come from."""

import csv
from collections.abc import Sequence
from pathlib import Path

from genattn.errors import GenAttnError

Row = dict[str, str]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the first column is left-aligned, the others right."""
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 1)), *(" | ".join(r) for r in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def read_rows(file: Path) -> list[Row]:
    """Every row. Raises GenAttnError for a file that is not there or empty."""
    if not file.is_file():
        raise GenAttnError(f"{file} is not there; measure first (make bench)")
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows:
        raise GenAttnError(f"{file} must hold rows, got none; measure again")
    return rows
