"""docs/evidence.md and docs/scale.md with their pictures, written anew or compared with what stands there."""

from pathlib import Path

from genattn.apps.pages import evidence, scale_page
from genattn.apps.pages.evidence_plots import draw_all, plots
from genattn.apps.pages.evidence_tables import Tables
from genattn.errors import GenAttnError, RunFailed
from genattn.whole_file import write_whole


def rebuild(root: Path | None = None, check: bool = False) -> list[evidence.Evidence]:
    """Write the pages from the files under assets/, or with `check` only compare; returns the evidence they show.

    Raises GenAttnError if `root` is no checkout, or with `check` if a page or picture is not what the files say.
    """
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
            raise RunFailed(f"{', '.join(stale)} must be what the files say; run: genattn evidence")
        return found
    draw_all(tables, root / "assets" / "figures")
    for name, text in pages.items():
        write_whole(root / "docs" / name, text)
    return found


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
