"""The table of what stacks with what, measured: one row per neighbour and method in assets/bench/stacking.csv.

    python -m genattn.apps.laboratory.stacking.run                      all neighbours
    python -m genattn.apps.laboratory.stacking.run --only cache-dit     those whose name begins so, added to the rows there are

Tiny random models on the CPU; packages that are not installed give rows that say so. cache-dit, SDNQ and the quantisers come
with `pip install -e '.[quantizers,stacking]'`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.apps.laboratory.stacking.cells import Cell, measure_row, version_of
from genattn.apps.laboratory.stacking.neighbours import NEIGHBOURS, Neighbour
from genattn.apps.sampling.measured_rows import append_rows, provenance

TABLE = Path(__file__).resolve().parents[3] / "assets" / "bench" / "stacking.csv"


def rows_of(neighbour: Neighbour) -> list[dict[str, Any]]:
    """One row per method."""
    where = provenance("cpu")
    return [_row(neighbour, cell, where) for cell in measure_row(neighbour)]


def _row(neighbour: Neighbour, cell: Cell, where: dict[str, str]) -> dict[str, Any]:
    return {
        "neighbour": neighbour.name,
        "kind": neighbour.kind,
        "package": neighbour.package,
        "version": version_of(neighbour),
        "method": cell.method,
        "result": cell.result,
        "error": f"{cell.error:.1e}",
        "note": cell.note,
        **where,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 when a cell differs from its reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="neighbours whose name begins with this")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    chosen = [n for n in NEIGHBOURS if n.name.lower().startswith(given.only.lower())]
    if not chosen:
        names = ", ".join(n.name for n in NEIGHBOURS)
        parser.error(f"--only must begin the name of a neighbour, got {given.only!r}; there are {names}")
    wrong = 0
    for neighbour in chosen:
        rows = rows_of(neighbour)
        append_rows(given.out, rows)
        print(neighbour.name, {row["method"]: row["result"] for row in rows}, flush=True)
        wrong += sum(row["result"] == "differs" for row in rows)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
