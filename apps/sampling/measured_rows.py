"""Measured rows: what each must carry, and how it is appended to a file under assets/bench."""

import csv
import io
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import genattn
from genattn.apps.sampling.output_files import check_out
from genattn.apps.sampling.run import versions
from genattn.errors import GenAttnError
from genattn.fingerprint import place_of, precision
from genattn.kernels.cpu.native_build import native_library
from genattn.one_writer import only_writer
from genattn.text_file import read_text
from genattn.whole_file import whole_file

_PATIENCE = 60.0  # seconds; an append takes a moment


def provenance(device: str) -> dict[str, str]:
    """What every measured row carries: device, versions, commit, date."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        **{f"{k}_version": v for k, v in versions().items()},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def machine_of(pipe: Any) -> str:
    """What seconds depend on beside the request: device, precision, the versions of what computes, and whether the C++ kernel
    serves, in one line."""
    told = provenance(place_of(pipe))
    numbers = [f"{name} {told[f'{name}_version']}" for name in ("torch", "diffusers", "triton")]
    compiled = ["no C++ kernel"] if place_of(pipe) == "cpu" and isinstance(native_library(), str) else []
    return ", ".join([told["device"], precision(pipe), *numbers, *compiled])


def _commit() -> str:
    root = Path(genattn.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package may lie in somebody else's checkout
        return "not a checkout"
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:  # no git: measured rows must not be lost for the want of a name
        return "unknown"
    return found.stdout.strip() or "unknown"


def check_rows(path: Path) -> None:
    """Make the folder of a CSV that rows shall be appended to, and read what is there: refused before rows are measured.

    Raises GenAttnError for what cannot be written, and for a file that is no such table.
    """
    check_out(path, (".csv",))
    read_rows(path)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV; new columns are added to the file's header, missing ones stay empty. Several may append at once.

    Raises GenAttnError for what `read_rows` refuses, and where somebody else has the file for a minute.
    """
    place = Path(path).resolve()
    with only_writer(place.with_name(f"{place.name}.rows"), "file", _PATIENCE):
        old = read_rows(path)
        names = list(dict.fromkeys(k for row in [*old, *rows] for k in row))
        with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*old, *rows])


def ends_with(path: Path, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether these rows, whatever their date, are the last ones of a CSV: a stop may come when they have just been added."""
    return [_undated(row) for row in read_rows(path)[-len(rows) :]] == [_undated(row) for row in rows]


def _undated(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items() if name != "date" and value not in (None, "")}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, every value as it stands there; none without the file.

    Raises GenAttnError for a file that is no text, or has a row of more cells than there are columns.
    """
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise GenAttnError(f"{path} must be a CSV in UTF-8, and cannot be read ({error}); name another file") from None
    wrong = next((number for number, row in enumerate(rows, 2) if None in row), None)
    if wrong is not None:
        raise GenAttnError(f"{path} must have a cell a column, and row {wrong} has more; name another file")
    return rows


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
