"""The table of model families: what holds for each, tried out on its tiny model and written to assets/families.csv.

    python -m genattn.apps.pages.family_table              all families; rows that are there already are kept
    python -m genattn.apps.pages.family_table --compile    only the compile columns that are still empty
    python -m genattn.apps.pages.family_table --page       write docs/families.md from the file and the judged models

A row that fails says why. Nothing here needs a GPU or a download. The trials are those of `apps/laboratory/models`.
"""

import argparse
import ast
import csv
import io
import re
import sys
import warnings
from pathlib import Path

import diffusers

from genattn.apps.laboratory.models import stock_testers
from genattn.apps.laboratory.models.family_compile import compile_columns
from genattn.apps.laboratory.models.family_trials import try_family
from genattn.apps.laboratory.models.stock_testers import summary
from genattn.layouts.families import FAMILIES
from genattn.layouts.judged import judged
from genattn.pipelines.tiny.random.build import families

ROOT = Path(__file__).resolve().parents[2]
TABLE, PAGE = ROOT / "assets" / "families.csv", ROOT / "docs" / "families.md"
COLUMNS = (
    "family",
    "model",
    "sites",
    "layout",
    "layout_exact",
    "dense_bit_exact",
    "removed_exactly",
    "radial_runs",
    "radial_density",
    "gna_density",
    "tail_runs",
    "softpag_runs",
    "nag_runs",
    "compile_regional",
    "compile_full",
    "note",
    "diffusers",
    "torch",
    "device",
)


def row_of(family: str, with_compile: bool = True) -> dict[str, str]:
    """One row, everything tried out."""
    row = dict.fromkeys(COLUMNS, "") | try_family(family)
    return row | (compile_columns(family) if with_compile else {})


def read_rows(path: Path = TABLE) -> list[dict[str, str]]:
    """Rows of the file, none when it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, str]], path: Path = TABLE) -> None:
    """Replace the file, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(text.getvalue())
    fresh.replace(path)


_HEAD = {
    "sites": "sites",
    "layout_exact": "layout exact",
    "dense_bit_exact": "dense bit-exact",
    "removed_exactly": "removed exactly",
    "radial_density": "radial: density",
    "gna_density": "window: density",
    "tail_runs": "tail",
    "softpag_runs": "SoftPAG",
    "nag_runs": "NAG",
    "compile_regional": "compile: blocks",
    "compile_full": "compile: whole",
}


def counts() -> tuple[int, int]:
    """(transformer classes of the installed diffusers with a layout, all of them with attention)."""
    here = attention_models("transformers")
    known = {name for family in FAMILIES for name in family.models} - {"SanaTransformer2DModel"}
    return len(here & known), len(here)


def attention_models(folder: str) -> set[str]:
    """Model classes that diffusers/models/<folder> defines, read without importing them."""
    found = set()
    for path in sorted((Path(diffusers.__file__).parent / "models" / folder).glob("*.py")):
        classes = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
        found |= {node.name for node in classes if any("ModelMixin" in ast.unparse(base) for base in node.bases)}
    return found


def claim() -> str:
    """The sentence of README."""
    known, total = counts()
    return f"{known} of {total} attention models in diffusers {diffusers.__version__} have an exact layout."


def markdown(rows: list[dict[str, str]]) -> str:
    """The table; what fails stands below it with its reason."""
    lines = [f"| family | {' | '.join(_HEAD.values())} |", f"|{'---|' * (len(_HEAD) + 1)}"]
    notes: list[str] = []
    for row in rows:
        cells = []
        for key in _HEAD:
            value = row.get(key) or "-"
            if len(value) > 8:
                notes.append(f"{row['family']}, {_HEAD[key]}: {_reason(value)}")
                value = f"no ({len(notes)})"
            cells.append(value)
        if row["note"]:
            notes.append(f"{row['family']}: {row['note']}")
        lines.append(f"| {row['family']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _reason(value: str) -> str:
    """A recorded error as a reader wants it: the reason alone, without the error's name or half a sentence at its end."""
    value = re.sub(r"^GenAttnError: (NAG needs a model whose image looks at text, got \w+: )?", "", value)
    value = value.removesuffix("; see docs/nag.md for the families")
    value = value.replace("not tried: stock itself does not:", "not tried, because the stock model itself fails:")
    return re.sub(r"\s*\((Size-li[^)]*)?$|\s*\(Size-like symbols[^)]*\)$", "", value.strip())


def _not_run(testers: list[dict[str, str]]) -> dict[str, list[str]]:
    """Testers by the reason for which diffusers itself does not run them here."""
    found: dict[str, list[str]] = {}
    for row in testers:
        if row["stock"] != "yes":
            reason = row["stock"].replace("|", " ")
            wants_hub = "expected input[" in reason or "cannot be multiplied" in reason
            reason = "its inputs fit a checkpoint of the hub, not its own small settings" if wants_hub else reason
            found.setdefault(reason, []).append(row["tester"].split(":")[-1])
    return found


def page(rows: list[dict[str, str]], testers: list[dict[str, str]]) -> str:
    """docs/families.md from the rows of families and those of diffusers' testers."""
    generic = sorted(family.name for family in FAMILIES if family.generic)
    refused = [f"| {name} | {reason} |" for name, reason in judged().items()]
    return "\n".join(
        [
            "# Model families",
            "",
            "This page shows which models of diffusers work with which part of genattn. Each was tried.",
            "",
            f"{claim()} Generated by `python -m genattn.apps.pages.family_table --page` from",
            "[assets/families.csv](../assets/families.csv): every row was tried on a tiny model with random weights, on a CPU.",
            "`python -m genattn.apps.laboratory.models.every_class` tries every class again in a minute or two: stock, with",
            "plugins and after removal, one line each.",
            "",
            "| column | what it says |",
            "|---|---|",
            "| sites | the number of attention modules that genattn reaches in the tiny model |",
            "| layout exact | genattn knows for each token its frame, row and column, or that it is text |",
            "| dense bit-exact | with a dense pattern the output equals the stock model's bit for bit |",
            "| removed exactly | after `remove()` every object is the stock one again |",
            "| radial, window | density of the sparse calls on some hundred tokens, without a tail. Radial acts across frames, "
            "so it has no figure for a picture (`picture`) or for a model that looks at one frame at a time (`1 frame`) |",
            "| tail, SoftPAG, NAG | the method runs |",
            "| compile | under `torch.compile` a forward with plugins has as many graphs as the stock one and the same bits, "
            "and does not recompile when schedule or pattern change (eager backend; block by block, and the whole model) |",
            "",
            "A number in brackets points to a note below the table, where further notes on families stand too.",
            "",
            "For these models the layout is read from the model's own positions (`genattn/layouts/positions.py`):",
            f"{', '.join(generic)}.",
            "",
            markdown(rows),
            "",
            "## In the configurations of diffusers' own tests",
            "",
            f"{summary(testers)} [assets/stock_testers.csv](../assets/stock_testers.csv) has a row for each, made by",
            "`python -m genattn.apps.laboratory.models.stock_testers --checkout DIFFUSERS`. The others do not run here:",
            "",
            "| reason | testers |",
            "|---|---|",
            *(f"| {reason} | {', '.join(names)} |" for reason, names in _not_run(testers).items()),
            "",
            "## Models without a layout",
            "",
            "| class | reason |",
            "|---|---|",
            *refused,
            "| SanaTransformer2DModel | linear attention: there is no score matrix to make sparse or to edit |",
            "",
            "## Limits",
            "",
            "Tiny models with random weights show that a pattern finds its tokens and that nothing else changes. They say",
            "nothing about how good the pictures of the large checkpoint are, or how fast it is.",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Fill the table, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write docs/families.md from the file")
    parser.add_argument("--only", nargs="*", default=None, metavar="FAMILY", help="try these again")
    parser.add_argument("--compile", action="store_true", help="try only the compile columns")
    parser.add_argument("--no-compile", action="store_true", help="leave the compile columns for a later run")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    rows = {row["family"]: row for row in read_rows(given.out)}
    if given.page:
        PAGE.write_text(page([rows[name] for name in families() if name in rows], stock_testers.read_rows()))
        return 0
    warnings.filterwarnings("ignore")
    wanted = ("softpag_runs",) if given.no_compile else ("compile_regional", "compile_full")
    for family in given.only if given.only is not None else families():
        known = rows.get(family, {})
        if given.only is None and all(known.get(column) for column in wanted):
            continue
        fresh = compile_columns(family) if given.compile and known else row_of(family, not given.no_compile)
        rows[family] = {**known, **{key: value for key, value in fresh.items() if value or key not in known}}
        write_rows([rows[name] for name in families() if name in rows], given.out)
        print(family, {k: v for k, v in fresh.items() if k in COLUMNS[2:15]}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
