"""The command about claims and measurements: evidence."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines
from genattn.errors import GenAttnError


def evidence_command(
    root: Annotated[Path | None, typer.Option(help="A checkout of the project; default: the one this runs from.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail when the pages are not what the files say.")] = False,
    as_json: options.Json = False,
) -> None:
    """Rebuild docs/evidence.md (every claim, what was measured, a verdict) and docs/scale.md from the files in assets/.

    Example: genattn evidence --check
    """
    from genattn.apps.pages import evidence, scale_page
    from genattn.apps.pages.evidence_plots import draw_all, plots
    from genattn.apps.pages.evidence_tables import Tables

    root = root or evidence.ROOT
    if not (root / "assets" / "claims.json").is_file():
        raise GenAttnError(f"evidence needs a checkout of the project, and {root} has no assets/claims.json; give --root")
    tables, found = Tables(root / "assets" / "bench"), evidence.gather(root)
    figures = [(name, caption) for name, caption, _ in plots(tables)]
    pages = {"evidence.md": evidence.page(found, figures), "scale.md": scale_page.page(tables)}
    if check:
        stale = [name for name, text in pages.items() if not _same(root / "docs" / name, text)]
        stale += [name for name, _ in figures if not (root / "assets" / "figures" / name).is_file()]
        if stale:
            raise GenAttnError(f"{', '.join(stale)} must be what the files say; run: genattn evidence")
    else:
        draw_all(tables, root / "assets" / "figures")
        for name, text in pages.items():
            (root / "docs" / name).write_text(text, encoding="utf-8")
    if as_json:
        print_json([asdict(e) for e in found])
    else:
        counts = {verdict: sum(e.verdict == verdict for e in found) for verdict in dict.fromkeys(e.verdict for e in found)}
        print_lines(f"{len(found)} claims", *(f"{count:4d}  {verdict}" for verdict, count in counts.items()))


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
