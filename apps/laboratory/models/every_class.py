"""Every class of diffusers that has a layout here: stock, with plugins, and after removal, bit by bit, on tiny random models.

    python -m genattn.apps.laboratory.models.every_class [--only WORD]

prints a line for each class and a count, downloads nothing, takes some minutes on one core, and ends with 1 when something
differs: the outputs while every attention call goes through a plugin or a dense pattern, a sparse run that is not finite, or
anything after removal. The configurations of diffusers' own tests are those of `stock_testers`.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from typing import Any

import diffusers
from torch import nn

from genattn.apps.laboratory.models.family_trials import BY_FRAME, window
from genattn.apps.laboratory.models.stock_testers import Alone, Row, applied, fill
from genattn.layouts.judged import judged
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS, settle

TWINS = {"ChronoEditTransformer3DModel": "wan-i2v"}
"""Classes of another's settings and forward, by the family that stands for them in the tables."""
_BAD = {"differs", "not finite"}


def rows_of(name: str) -> list[tuple[Row, str]]:
    """(row, density under a window) of each family of a class."""
    twin = TWINS.get(name)
    found = [twin] if twin else [family for family in families() if MODELS[family].model == name]
    return [_row(family, _built(family, name)) for family in found]


def _built(family: str, name: str) -> nn.Module:
    if MODELS[family].model == name:
        return build_model(family)
    spec = replace(MODELS[family], model=name)
    model = spec.build(spec.config).eval()
    settle(model, spec.zero, seed=0)
    return model


def _row(family: str, model: nn.Module) -> tuple[Row, str]:
    large = MODELS[family].large
    row, alone = Row(family, type(model).__name__), Alone(model, build_inputs(family, grid=large))
    fill(row, alone)
    shape = large[-2:] if large and family in BY_FRAME else large
    found = applied(alone, window(shape) if shape else NeighborhoodPattern(3), row)
    row.removed = alone.removed() if row.removed == "yes" else row.removed
    return row, found


def classes(word: str = "") -> list[str]:
    """Those that can be built, in order."""
    return sorted(name for name in {MODELS[family].model for family in families()} | TWINS.keys() if word in name)


def has_layout(name: str) -> bool:
    """Whether a pattern acts in it; Sana is known, and refused as linear."""
    return name not in judged() and name != "SanaTransformer2DModel"


def holds(name: str, rows: list[tuple[Row, str]]) -> bool:
    """Stock's to the bit but for sparse runs, which are finite, and every one of them sparse where there is a layout."""
    exact = all(row.holds and row.stock == "yes" and found not in _BAD for row, found in rows)
    sparse = all(cell[:1].isdigit() for row, found in rows for cell in (row.radial, found))
    exactly_dense = all(row.passed_on == row.dense == "yes" for row, _ in rows)
    return exact and (not has_layout(name) or (sparse and exactly_dense))


def line(name: str, rows: list[tuple[Row, str]]) -> str:
    """A class in one line; what its families differ in stands one behind the other."""
    cells: dict[str, Any] = {
        "sites": [row.sites for row, _ in rows],
        "passed on": [row.passed_on for row, _ in rows],
        "dense": [row.dense for row, _ in rows],
        "radial": [row.radial for row, _ in rows],
        "window": [found for _, found in rows],
        "removed": [row.removed for row, _ in rows],
    }
    told = ", ".join(f"{key} {' / '.join(dict.fromkeys(map(str, found)))}" for key, found in cells.items())
    return f"{'ok ' if holds(name, rows) else 'NOT'} {name} ({', '.join(row.tester for row, _ in rows)}): {told}"


def main(arguments: list[str] | None = None) -> int:
    """Try them all, say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="classes whose name has this word")
    given = parser.parse_args(arguments)
    good = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stock classes about their imports, of ours about small grids
        tried = classes(given.only)
        for name in tried:
            rows = rows_of(name)
            good += [name] if holds(name, rows) else []
            print(line(name, rows), flush=True)
    known = [name for name in good if has_layout(name)]
    unets = [name for name in known if ".unets." in getattr(diffusers, name).__module__]
    told = f"{len(known)} of them with a layout: {len(known) - len(unets)} transformers and {len(unets)} UNets"
    print(f"{len(good)} of {len(tried)} classes hold, {told}; diffusers {diffusers.__version__}.")
    return 0 if len(good) == len(tried) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
