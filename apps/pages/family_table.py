"""The table of model families: what holds for each, tried out on its tiny model and written to assets/families.csv.

    python -m genattn.apps.pages.family_table              all families; rows that are there for this commit's code are kept
    python -m genattn.apps.pages.family_table --markdown   print the table from the file

A row that fails says why. Nothing here needs a GPU or a download; the compile columns count Dynamo frames with the eager
backend.
"""

import argparse
import csv
import functools
import io
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from genattn.layouts.families import family_of
from genattn.layouts.site import AttentionSite
from genattn.patterns.dense import DensePattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

TABLE = Path(__file__).resolve().parents[2] / "assets" / "families.csv"
COLUMNS = (
    "family",
    "model",
    "sites",
    "layout",
    "layout_exact",
    "dense_bit_exact",
    "removed_exactly",
    "radial_runs",
    "compile_regional",
    "compile_full",
    "note",
    "diffusers",
    "torch",
    "device",
)


class _Layouts(Plugin):
    """Notes at every site whether the layout has the sequence's length."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.described = ""

    def wants(self, site: AttentionSite) -> bool:
        return site.kind in ("self", "joint", "spatial", "temporal")

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        if call.run.layout is not None:
            self.described = call.run.layout.describe()
        if call.layout is None or call.layout.seqlen != call.query.shape[1]:
            self.wrong.append(f"{call.site.name}: {call.query.shape[1]} tokens")
        return inner(call)


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's first output."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return out[0] if isinstance(out, list) else out


def identities(model: Any) -> dict[str, Any]:
    """Classes, attributes, processors and the globals of the processors' modules, by identity."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        kept[name] = (type(module), {key: id(value) for key, value in module.__dict__.items()})
        processor = getattr(module, "processor", None)
        if processor is not None:
            spaces = [vars(sys.modules[base.__module__]) for base in type(processor).__mro__]
            named = [{k: id(v) for k, v in space.items() if k in ("F", "dispatch_attention_fn")} for space in spaces]
            kept[f"{name} processor"] = (id(processor), type(processor), dict(vars(processor)), named)
    return kept


def row_of(family: str, with_compile: bool = True) -> dict[str, str]:
    """One row, everything tried out."""
    model, inputs = build_model(family), build_inputs(family)
    known = family_of(model)
    row = dict.fromkeys(COLUMNS, "")
    row |= {"family": family, "model": type(model).__name__, "note": known.note if known else "no layout known"}
    row |= {"diffusers": diffusers.__version__, "torch": torch.__version__, "device": platform.machine() + " CPU"}
    stock, before = forward(model, inputs), identities(model)
    layouts = _Layouts()
    handle = apply(model, layouts)
    row["sites"] = str(len([site for site in handle.sites if not site.unreachable]))
    same = torch.equal(forward(model, inputs), stock)
    handle.remove()
    row["layout"] = layouts.described
    row["layout_exact"] = "; ".join(layouts.wrong) or ("yes" if layouts.described else "no attention reached")
    row["dense_bit_exact"] = "yes" if same else "output differs"
    row["removed_exactly"] = "yes" if identities(model) == before else "something was left behind"
    row["radial_runs"] = _attempt(lambda: _radial(model, inputs))
    for how in ("regional", "full") if with_compile else ():
        row[f"compile_{how}"] = _attempt(functools.partial(_compiles, family, inputs, how, stock))
    return row


def _radial(model: Any, inputs: dict[str, Any]) -> str:
    with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
        out = forward(model, inputs)
        report = handle.report()
    if not bool(out.isfinite().all()):
        return "not finite"
    return "yes" if report.sparse_calls == report.calls else "; ".join(report.dense_reasons)


def _compiles(family: str, inputs: dict[str, Any], how: str, stock: torch.Tensor) -> str:
    """Frames equal to stock's, applied before compiling; none added while schedule and pattern change."""
    try:
        frames, _ = _frames(family, inputs, how, None)
    except Exception as error:
        return f"stock itself does not: {_first_line(error)}"
    mine, out = _frames(family, inputs, how, lambda model: apply(model, DensePattern()))
    if mine != frames:
        return f"{mine} frames where stock has {frames}"
    return "yes" if torch.equal(out, stock) else f"largest difference {float((out - stock).abs().max()):.1e}"


def _frames(family: str, inputs: dict[str, Any], how: str, put_on: Callable[[Any], Handle] | None) -> tuple[int, torch.Tensor]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = build_model(family), CompileCounterWithBackend("eager")
    handle = put_on(model) if put_on is not None else None
    runner: Any = model
    if how == "full":
        runner = torch.compile(model, fullgraph=True, backend=counter)
    else:
        for block in _blocks(model):
            block.compile(fullgraph=True, backend=counter)
    out = forward(runner, inputs)
    if handle is not None:
        radial = apply(model, RadialPattern(), dense_steps=0)
        for options in ({}, {"dense_layers": 0}, {"enabled": False}):
            with radial.options(**options):
                forward(runner, inputs)
        radial.remove()
        handle.remove()
    torch._dynamo.reset()
    return counter.frame_count, out


def _blocks(model: Any) -> list[Any]:
    """The blocks that `compile_repeated_blocks` takes, or those of the family's stacks."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    return [module for module in model.modules() if type(module).__name__.endswith("TransformerBlock")]


def _attempt(try_out: Callable[[], str]) -> str:
    try:
        return try_out()
    except Exception as error:  # a table of what fails must not fail
        return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


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


def markdown(rows: list[dict[str, str]]) -> str:
    """The table for README; what fails stands below it with its reason."""
    head = ("family", "sites", "layout exact", "dense bit-exact", "removed exactly", "radial runs", "compile: blocks", "whole")
    keys = ("layout_exact", "dense_bit_exact", "removed_exactly", "radial_runs", "compile_regional", "compile_full")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    notes: list[str] = []
    for row in rows:
        cells = []
        for key in keys:
            if row[key] == "yes":
                cells.append("yes")
            else:
                notes.append(f"{row['family']}, {key.replace('_', ' ')}: {row[key] or 'not tried'}")
                cells.append(f"no ({len(notes)})")
        if row["note"]:
            notes.append(f"{row['family']}: {row['note']}")
        lines.append(f"| {row['family']} | {row['sites']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def main(arguments: list[str] | None = None) -> int:
    """Fill the table, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table from the file")
    parser.add_argument("--only", nargs="*", default=None, metavar="FAMILY", help="try these again")
    parser.add_argument("--no-compile", action="store_true", help="leave the compile columns for a later run")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    rows = {row["family"]: row for row in read_rows(given.out)}
    if given.markdown:
        print(markdown(list(rows.values())))
        return 0
    warnings.filterwarnings("ignore")
    for family in given.only if given.only is not None else families():
        if given.only is None and rows.get(family, {}).get("compile_full"):
            continue
        rows[family] = row_of(family, not given.no_compile)
        write_rows([rows[name] for name in families() if name in rows], given.out)
        print(family, {k: v for k, v in rows[family].items() if k in COLUMNS[2:10]}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
