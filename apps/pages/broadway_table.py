"""The table of BroadWay's study for docs/broadway.md, from assets/bench/broadway.csv or broadway_dit.csv.

Stock's values, then what each variant changes, with the interval over clips; the claim's verdict below.
"""

import csv
from pathlib import Path

from genattn.apps.pages.tables import Row, markdown_table
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.studies.broadway import verdict

SHOWN = ("dynamic_degree", "motion_amount", "consistency", "smoothness", "flickering", "accuracy", "colour", "shape", "motion")


def broadway_table(file: Path, model: str) -> str:
    """The newest row of every variant of `model` in `file` as Markdown; the note tells those of another commit than stock's.

    Raises:
        GenAttnError: if there is none.
    """
    if not file.is_file():
        raise GenAttnError(f"{file} is not there; run: python -m genattn.pipelines.tiny.studies.broadway --table {file}")
    with file.open(newline="") as handle:
        newest = {row["variant"]: row for row in csv.DictReader(handle) if row["model"] == model}
    if "stock" not in newest:
        raise GenAttnError(f"{file} must have rows of {model}, got none; run its study with --model assets/{model}")
    first, others = newest["stock"], [row for variant, row in newest.items() if variant != "stock"]
    earlier = [f"{r['variant']}: {r['date']}, commit {r['commit']}" for r in others if r["commit"] != first["commit"]]
    body = [[name.replace("_", " "), f"{float(first[name]):.4g}", *(_change(row, name) for row in others)] for name in SHOWN]
    table = markdown_table(["measure", "stock", *(row["variant"] for row in others)], body)
    said = "; ".join(
        verdict({**row, **{k: float(v) for k, v in row.items() if k.endswith(("_low", "_high"))}}) for row in others
    )
    note = (
        f"{first['model']}, {first['clips']} captions that training never saw, {first['steps']} steps, same noise, alpha "
        f"{first['alpha']}, beta {first['beta']}, guided until {float(first['stop']):.0%} of the steps; change against stock "
        f"with its bootstrap interval of 95 % over clips. {first['device']}, torch {first['torch']}, diffusers "
        f"{first['diffusers']}, {first['date']}, commit {first['commit']}{'; '.join(['', *earlier])}."
    )
    return f"{table}\n\n{said}.\n\n<sub>{note}</sub>"


def _change(row: Row, name: str) -> str:
    value, low, high = (float(row[f"{name}_{part}"]) for part in ("change", "low", "high"))
    return f"{value:+.3g} [{low:+.3g}, {high:+.3g}]"
