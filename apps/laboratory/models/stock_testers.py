"""Every configuration that diffusers tests its models with: stock, with plugins, and after removal, bit by bit.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python -m genattn.apps.laboratory.models.stock_testers --checkout diffusers

writes a row for each configuration to assets/stock_testers.csv:

    passed_on  all outputs against stock's while every attention call, cross-attention's too, goes through a plugin
    dense      the same with a dense pattern
    radial     density of a sparse run, or the reason why every call stays dense
    removed    outputs, and by identity whatever applying could touch, against what they were

The tests come from the checkout, the models from the diffusers that is installed. Some testers want packages of their own
(requests-mock, torchvision). Ends with 1 when a row differs.
"""

import argparse
import contextlib
import csv
import importlib
import inspect
import io
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from genattn.apps.laboratory.models.before_and_after import changed, identities, outputs, same_bits
from genattn.errors import GenAttnError, kind_and_line
from genattn.layouts.site import AttentionSite
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.seam.handle import apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "assets" / "stock_testers.csv"
FOLDERS = ("transformers", "unets")


@dataclass
class Row:
    """One configuration. `stock`: "yes", or why diffusers itself does not run it here; then the others stay empty."""

    tester: str
    model: str
    stock: str = ""
    sites: int = 0
    passed_on: str = ""
    dense: str = ""
    radial: str = ""
    removed: str = ""
    diffusers: str = diffusers.__version__
    torch: str = torch.__version__
    device: str = platform.machine() + " CPU"

    @property
    def holds(self) -> bool:
        """Nothing differs; a refusal is no difference."""
        return self.stock != "yes" or (
            self.removed == "yes" and not {"differs", "not finite"} & {self.passed_on, self.dense, self.radial}
        )


def testers(checkout: Path) -> Iterator[tuple[str, Any]]:
    """(file and class, the class) of each configuration under tests/models, or the error that reading its file raised.

    Raises GenAttnError when `checkout` is no checkout of diffusers.
    """
    home = checkout.resolve() / "tests" / "models"
    if not home.is_dir():
        raise GenAttnError(f"--checkout must be a checkout of diffusers, with tests/models; got {checkout}")
    with _importing(checkout.resolve()):
        for path in sorted(path for folder in FOLDERS for path in (home / folder).glob("test_*.py")):
            try:
                module = importlib.import_module(f"tests.models.{path.parent.name}.{path.stem}")
            except Exception as error:  # a package that only this tester needs
                yield f"{path.stem}", error
                continue
            yield from ((f"{path.stem}:{tester.__name__}", tester) for tester in configurations(module))


@contextlib.contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """`tests` is the folder's own, whatever else has that name."""

    def named() -> list[str]:
        return [name for name in sys.modules if name == "tests" or name.startswith("tests.")]

    others = {name: sys.modules.pop(name) for name in named()}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in named():
            del sys.modules[name]
        sys.modules.update(others)


def configurations(module: Any) -> list[type]:
    """The classes of a test module that name a model, its settings and its inputs: one of each combination."""
    found: dict[tuple[Any, ...], type] = {}
    for cls in vars(module).values():
        if not inspect.isclass(cls) or cls.__module__ != module.__name__:
            continue
        parts = [inspect.getattr_static(cls, name, None) for name in ("model_class", "get_init_dict", "get_dummy_inputs")]
        homes = [part.fget if isinstance(part, property) else part for part in parts]
        ours = [getattr(home, "__module__", "") == module.__name__ or inspect.isclass(home) for home in homes]
        if all(home is not None for home in homes) and all(ours):
            found.setdefault(tuple(homes), cls)
    return list(found.values())


def try_out(name: str, tester: Any) -> Row:
    """The row of one configuration, everything run."""
    if isinstance(tester, Exception):
        return Row(name, "", stock=f"cannot be read: {kind_and_line(tester)[:200]}")
    row = Row(name, "")
    try:
        made = tester()
        row.model = made.model_class.__name__
        torch.manual_seed(0)
        inputs = made.get_dummy_inputs()
        model = made.model_class(**made.get_init_dict()).eval().to(_precision(inputs))
        alone = Alone(model, inputs)
    except Exception as error:  # a test of another version of diffusers, a download
        row.stock = f"does not run: {kind_and_line(error)[:200]}"
        return row
    fill(row, alone)
    return row


class Alone:
    """A model as it is without plugins."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        first = identities(model)
        self.stock = outputs(model, inputs)
        self.before = identities(model)
        self.own = set(changed(first, self.before))  # what stock code makes anew in a forward
        self.steady = same_bits(outputs(model, inputs), self.stock)

    def removed(self) -> str:
        """Whether it is so again."""
        left = [name for name in changed(self.before, identities(self.model)) if name not in self.own]
        back = same_bits(outputs(self.model, self.inputs), self.stock)
        return "differs" if not back else f"left behind at {', '.join(left[:3])}" if left else "yes"


def fill(row: Row, alone: Alone) -> None:
    """The columns that are found by applying."""
    row.stock = "yes" if alone.steady else "differs from run to run"
    if not alone.steady:
        return
    row.passed_on = applied(alone, Passing(), row)
    row.dense = applied(alone, DensePattern(), row)
    row.radial = applied(alone, RadialPattern(), row)
    row.removed = alone.removed()


def _precision(inputs: dict[str, Any]) -> torch.dtype:
    """What testers of quantised weights give their inputs in: half precision."""
    given = {leaf.dtype for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in given), torch.float32)


class Passing(Plugin):
    """Every attention call goes through it, unchanged."""

    def wants(self, site: AttentionSite) -> bool:
        return True

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return inner(call)


def applied(alone: Alone, plugin: Pattern | Plugin, row: Row) -> str:
    """What became of a forward under `plugin`."""
    model, inputs, stock = alone.model, alone.inputs, alone.stock
    schedule: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0} if isinstance(plugin, Pattern) else {}
    try:
        handle = apply(model, plugin, **schedule)
    except GenAttnError as error:
        return f"refused: {error}"
    with handle:
        out = outputs(model, inputs)
        report = handle.report()
    row.sites = max(row.sites, len(report.sites))
    if not report.sparse_calls:
        told = "yes" if report.calls else "no attention was called"
        if isinstance(plugin, RadialPattern):
            told = f"dense: {'; '.join(report.dense_reasons) or told}"
        return told if same_bits(out, stock) else "differs"
    finite = all(bool(t.isfinite().all()) for t, s in zip(out, stock) if bool(s.isfinite().all()))
    return f"{report.density:.2f}" if finite else "not finite"


def write_rows(rows: list[Row], path: Path = TABLE) -> None:
    """Replace the file, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    fresh = path.with_suffix(".part")
    fresh.write_text(text.getvalue())
    fresh.replace(path)


def summary(rows: list[dict[str, Any]]) -> str:
    """The sentence about a table of rows."""
    ran = [row for row in rows if row["stock"] == "yes"]
    models = len({row["model"] for row in ran})
    same = sum(row["passed_on"] in ("yes", "no attention was called") and row["removed"] == "yes" for row in ran)
    return (
        f"{len(ran)} of {len(rows)} configurations of {models} model classes run here as diffusers' own tests have them; "
        f"{same} of them are stock's to the bit with every attention call going through a plugin, and after removal."
    )


def read_rows(path: Path = TABLE) -> list[dict[str, str]]:
    """Rows of the table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> int:
    """Try them all, write the table, say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of a checkout of diffusers")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--only", default="", metavar="WORD", help="testers whose name has this word")
    given = parser.parse_args(arguments)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stock classes about their imports, of ours about small grids
        for name, tester in testers(given.checkout):
            if given.only in name:
                rows.append(try_out(name, tester))
                print(f"{name}: stock {rows[-1].stock}, dense {rows[-1].dense}, removed {rows[-1].removed}", flush=True)
                write_rows(rows, given.out)
    wrong = [row for row in rows if not row.holds]
    print(summary([asdict(row) for row in rows]))
    for row in wrong:
        print(f"  {row.tester}: passed on {row.passed_on}; dense {row.dense}; radial {row.radial}; removed {row.removed}")
    return 1 if wrong or not any(row.stock == "yes" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
