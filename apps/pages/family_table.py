"""The table of model families: what holds for each, tried out on its tiny model and written to assets/families.csv.

    python -m genattn.apps.pages.family_table              all families; rows that are there already are kept
    python -m genattn.apps.pages.family_table --compile    only the compile columns that are still empty
    python -m genattn.apps.pages.family_table --page       write docs/families.md from the file and the judged models

A row that fails says why. Nothing here needs a GPU or a download; the compile columns count Dynamo frames with the eager
backend, and give up on a model after `COMPILE_SECONDS` of this processor.
"""

import argparse
import ast
import copy
import csv
import functools
import io
import platform
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from genattn.apps.laboratory.models import stock_testers
from genattn.apps.laboratory.models.before_and_after import changed, identities
from genattn.apps.laboratory.models.stock_testers import summary
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.layouts.families import FAMILIES, family_of
from genattn.layouts.judged import judged
from genattn.layouts.site import AttentionSite
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.seam.sites import find_sites

ROOT = Path(__file__).resolve().parents[2]
COMPILE_SECONDS = 150
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
        if call.layout is None and call.run.layout is not None and call.key.shape[1] < call.run.layout.seqlen:
            return inner(call)  # over a part of the sequence by a rule of the model's own
        if call.layout is None or call.layout.seqlen != call.query.shape[1]:
            self.wrong.append(f"{call.site.name}: {call.query.shape[1]} tokens")
        return inner(call)


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's first output."""
    with torch.no_grad():
        out = model(**copy.deepcopy(inputs), return_dict=False)  # caches among the inputs are written to
    while isinstance(out, list | tuple):
        out = out[0]
    return out


def row_of(family: str, with_compile: bool = True) -> dict[str, str]:
    """One row, everything tried out."""
    model, inputs = build_model(family), build_inputs(family)
    known = family_of(model)
    row: dict[str, str] = dict.fromkeys(COLUMNS, "")
    row |= {"family": family, "model": type(model).__name__, "note": known.note if known else "no layout known"}
    row |= {"diffusers": diffusers.__version__, "torch": torch.__version__, "device": platform.machine() + " CPU"}
    first, stock = identities(model), forward(model, inputs)
    before = identities(model)
    own = set(changed(first, before))  # what stock code makes anew in a forward
    layouts = _Layouts()
    handle = apply(model, layouts)
    row["sites"] = str(len([site for site in handle.sites if not site.unreachable]))
    same = torch.equal(forward(model, inputs), stock)
    handle.remove()
    row["layout"] = layouts.described
    row["layout_exact"] = "; ".join(layouts.wrong) or ("yes" if layouts.described else "no attention reached")
    row["dense_bit_exact"] = "yes" if same else "output differs"
    left = [name for name in changed(before, identities(model)) if name not in own]
    row["removed_exactly"] = f"left behind at {', '.join(left[:3])}" if left else "yes"
    row["radial_runs"] = _attempt(lambda: _runs(model, inputs, RadialPattern()))
    _more(family, row, model, inputs)
    return row | (compile_columns(family) if with_compile else {})


def compile_columns(family: str) -> dict[str, str]:
    """Blocks compiled one by one, and the whole model, each against stock compiled alike."""
    inputs = build_inputs(family)
    stock = forward(build_model(family), inputs)
    tries = {how: functools.partial(_compiles, family, inputs, how, stock) for how in ("regional", "full")}
    return {f"compile_{how}": _attempt(functools.partial(_within, COMPILE_SECONDS, run)) for how, run in tries.items()}


class _TooLong(BaseException):
    """Not an Exception: Dynamo turns those into its own."""


def _within(seconds: float, try_out: Callable[[], str]) -> str:
    """The answer, or "not tried" after so many seconds of processor time."""

    def stop(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return try_out()
    except _TooLong:
        return f"not tried: tracing took longer than {seconds:g} s on one core"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _sparse(model: Any, inputs: dict[str, Any], pattern: Pattern) -> str:
    """Density of the sparse calls, with what stays dense by a rule of the model's own."""
    with apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
        out = forward(model, inputs)
        report = handle.report()
    if not bool(out.isfinite().all()):
        return "not finite"
    return f"{report.density:.2f}" if report.sparse_calls else "; ".join(report.dense_reasons)


def _runs(model: Any, inputs: dict[str, Any], pattern: Pattern) -> str:
    """Whether the pattern acts and the answer is finite."""
    found = _sparse(model, inputs, pattern)
    return "yes" if found[:1].isdigit() else found


def _window(shape: tuple[int, ...], **settings: Any) -> NeighborhoodPattern:
    return NeighborhoodPattern(tuple(max(3, n // 6) if n > 3 else -1 for n in shape), **settings)


def _softpag(model: Any, inputs: dict[str, Any]) -> str:
    """A guided forward, its last layer's first head perturbed: finite, and not the clean answer."""
    clean = forward(model, inputs)
    depth = max(site.depth for site in apply_sites(model))
    with apply(model, SoftPAG({(depth, 0): 1.0}, layout="single")):
        out = forward(model, inputs)
    return "yes" if bool(out.isfinite().all()) and not torch.equal(out, clean) else "no difference"


def apply_sites(model: Any) -> list[AttentionSite]:
    """Sites at which a pattern or head guidance may act."""
    sites = [site for _, site in find_sites(model, "", family_of(model))]
    return [site for site in sites if site.kind in ("self", "joint", "spatial") and site.depth >= 0]


def _more(family: str, row: dict[str, str], model: Any, inputs: dict[str, Any]) -> None:
    """The columns that need a raster large enough for tiles to be left out, and those of guidance."""
    large = MODELS[family].large
    if large is not None:
        wide = build_inputs(family, grid=large)
        by_frame = family in ("latte", "animatediff")
        thinned = "picture" if len(large) < 3 else "1 frame" if by_frame else ""
        row["radial_density"] = thinned or _attempt(lambda: _sparse(model, wide, RadialPattern(tail=None)))
        shape = large[-2:] if by_frame else large
        row["gna_density"] = _attempt(lambda: _sparse(model, wide, _window(shape, tail=None)))
        row["tail_runs"] = _attempt(lambda: _runs(model, wide, _window(shape, tail="mean")))
    row["softpag_runs"] = _attempt(lambda: _softpag(model, inputs))
    row["nag_runs"] = _attempt(lambda: _nag(model))


def _nag(model: Any) -> str:
    """Whether a negative prompt can act inside this model's attention: the plugin says so when it is put on."""
    from genattn.guidance.nag import NAG

    apply(model, NAG("blurry")).remove()
    return "yes"


def _compiles(family: str, inputs: dict[str, Any], how: str, stock: torch.Tensor) -> str:
    """Frames equal to stock's, applied before compiling; none added while schedule and pattern change."""
    try:
        frames, _ = _frames(family, inputs, how, None)
    except Exception as error:
        return f"not tried: stock itself does not: {_first_line(error)}"
    if not frames:
        return "not tried: no attention of stock's stands in a stack of blocks"
    refusal = next((site.unreachable for site in apply_sites(build_model(family)) if site.unreachable), "")
    if refusal:
        return f"refused: {refusal}"
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
    """The blocks that `compile_repeated_blocks` takes; where a model names none, the members of its stacks that attend."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    attending = {id(module) for module, _ in find_sites(model, "", family_of(model))}
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    members = [block for stack in stacks for block in stack if any(id(part) in attending for part in block.modules())]
    inner = {id(part) for block in members for part in block.modules() if part is not block}
    return [block for block in members if id(block) not in inner]


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
                notes.append(f"{row['family']}, {_HEAD[key]}: {value}")
                value = f"no ({len(notes)})"
            cells.append(value)
        if row["note"]:
            notes.append(f"{row['family']}: {row['note']}")
        lines.append(f"| {row['family']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


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
            f"{claim()} Generated by `python -m genattn.apps.pages.family_table --page` from",
            "[assets/families.csv](../assets/families.csv): every row was tried on a tiny model with random weights, on a CPU.",
            "",
            "Densities are those of the sparse calls on some hundred tokens, nothing standing in for what is left out;",
            "Radial thins out over frames, so a picture has none, nor has a model that looks at one frame at a time.",
            "`compile`: a forward with plugins has as many graphs as stock's and the same bits, and gets no further ones while",
            "schedule and pattern change; eager backend, blocks one by one and the whole model.",
            "",
            f"The layout is read from the model's own positions (`genattn/layouts/positions.py`) in: {', '.join(generic)}.",
            "",
            markdown(rows),
            "",
            "## In the configurations of diffusers' own tests",
            "",
            f"{summary(testers)} A row each: [assets/stock_testers.csv](../assets/stock_testers.csv), by",
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
