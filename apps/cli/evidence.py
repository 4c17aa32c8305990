"""The command about claims and measurements: evidence."""

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines
from genattn.apps.cli.stopping import say_when_stopped
from genattn.errors import GenAttnError


def evidence_command(
    root: Annotated[Path | None, typer.Option(help="A checkout of the project; default: the one this runs from.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing, and fail if the pages do not match the files.")] = False,
    as_json: options.Json = False,
) -> None:
    """Rebuild docs/evidence.md (every claim, what was measured, a verdict) and docs/scale.md from the files in assets/.

    Example: genattn evidence --check
    """
    if find_spec("genattn.apps.pages") is None:
        raise GenAttnError(
            "evidence rebuilds this project's own pages, and an installed genattn comes without what makes them; "
            "run it in a checkout of the project"
        )
    if not check:
        say_when_stopped("stopped; each page is whole, and the same command rebuilds those that are still as before")
    found = import_module("genattn.apps.pages.rebuild").rebuild(root, check)
    if as_json:
        print_json([asdict(e) for e in found])
    else:
        counts = {verdict: sum(e.verdict == verdict for e in found) for verdict in dict.fromkeys(e.verdict for e in found)}
        print_lines(f"{len(found)} claims", *(f"{count:4d}  {verdict}" for verdict, count in counts.items()))
