"""Measured rows: what each must carry, and how it is appended to a file under assets/bench."""

import csv
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import genattn
from genattn.apps.sampling.run import versions


def provenance(device: str) -> dict[str, str]:
    """What every measured row carries: device, versions, commit, date."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    root = Path(genattn.__file__).resolve().parent.parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "device": name,
        **{f"{k}_version": v for k, v in versions().items()},
        "commit": found.stdout.strip() or "not a checkout",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV; new columns are added to the file's header, missing ones stay empty."""
    old = read_rows(path)
    names = list(dict.fromkeys(k for row in [*old, *rows] for k in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])
    part.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, every value as it stands there; none without the file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merged(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], keys: Sequence[str], order: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of both; where both have the same values under `keys`, the new one.

    Args:
        old: rows as they stand.
        new: rows made now.
        keys: columns that name a row.
        order: columns to sort by, as text; the rows stay as they come where empty.
    """
    found = {tuple(str(row[key]) for key in keys): row for row in (*old, *new)}
    return sorted(found.values(), key=lambda row: [str(row[name]) for name in order])
