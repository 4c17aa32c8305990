"""The documentation as a site: `python -m genattn.apps.pages.site.build --out build/site`.

Pages in docs/ link to files beside them, as a forge wants it. Here they are copied to one folder together with README,
CHANGELOG, CONTRIBUTING and the pictures. Links are turned there, links into the source become plain words, flow charts become
pictures, and a page per room lists the public classes and functions. MkDocs then builds with warnings as errors. Nothing is
loaded from elsewhere, at build or at view.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from genattn.apps.pages.site.flowchart import as_pictures
from genattn.errors import GenAttnError

ROOT = Path(__file__).resolve().parents[3]
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PICTURES = (".png", ".svg", ".jpg", ".gif")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")

# what a user calls, by room; the rest of the code is described in docs/architecture.md
REFERENCE: dict[str, tuple[str, ...]] = {
    "genattn": ("genattn.seam.handle", "genattn.functional.dispatch", "genattn.geometry.token_layout", "genattn.seam.schedule"),
    "patterns": (
        "genattn.patterns.radial", "genattn.patterns.neighborhood", "genattn.patterns.adaptive", "genattn.patterns.profiled",
        "genattn.patterns.combine", "genattn.patterns.pattern",
    ),
    "guidance": (
        "genattn.guidance.softpag.softpag", "genattn.guidance.nag.nag", "genattn.guidance.broadway.broadway",
        "genattn.guidance.heads.head_set",
    ),
    "long video": ("genattn.pipelines.long_video.generate", "genattn.pipelines.long_video.ouroboros.ouroboros"),
    "planning": ("genattn.planning.ladder", "genattn.planning.break_even", "genattn.profiling.profile"),
    "kernels": ("genattn.kernels.block_sparse",),
}  # fmt: skip


def turned(text: str, page: Path, root: Path = ROOT) -> str:
    """A page's text with its links as the site has them. page: where it stands in the checkout."""

    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        place = (page.parent / target).resolve()
        name = _on_site(place, root)
        return f"{picture}[{words}]({name}{anchor})" if name else words

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def _on_site(place: Path, root: Path) -> str:
    """Where a file of the checkout stands on the site; empty when it does not."""
    if place.parent == root / "docs" and place.suffix == ".md":
        return "documentation.md" if place.name == "README.md" else place.name
    if place.parent == root and place.name in ROOT_PAGES:
        return "index.md" if place.name == "README.md" else place.name
    if place.suffix in PICTURES and root / "assets" in place.parents:
        return f"pictures/{place.name}"
    return ""


def gather(folder: Path, root: Path = ROOT) -> list[Path]:
    """Copy pages and pictures for the site into `folder`, which is emptied; gives the pages."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    written = []
    for page in [*(root / name for name in ROOT_PAGES), *sorted((root / "docs").glob("*.md"))]:
        place = folder / _on_site(page, root)
        text = turned(page.read_text(encoding="utf-8"), page, root)
        place.write_text(as_pictures(text, page.stem, folder / "pictures"), encoding="utf-8")
        written.append(place)
    for picture in (root / "assets").rglob("*"):
        if picture.suffix in PICTURES:
            shutil.copy(picture, folder / "pictures" / picture.name)
    return written + reference(folder)


def reference(folder: Path) -> list[Path]:
    """One page per entry of REFERENCE, filled from the docstrings when the site is built."""
    written = []
    for name, modules in REFERENCE.items():
        place = folder / f"reference-{name.replace(' ', '-')}.md"
        blocks = "\n\n".join(f"## {module}\n\n::: {module}" for module in modules)
        place.write_text(f"# Reference: {name}\n\n{blocks}\n", encoding="utf-8")
        written.append(place)
    return written


def link_package(folder: Path, root: Path = ROOT) -> None:
    """The package as a wheel would hold it, for the reader of the docstrings, which cannot follow the folder map."""
    package = folder / "genattn"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (root / "genattn").iterdir():
        (package / source.name).symlink_to(source)
    for name in ("kernels", "guidance", "pipelines"):
        (package / name).mkdir()
        (package / name / "__init__.py").touch()  # these folders have none of their own
        for source in (root / name).iterdir():
            (package / name / source.name).symlink_to(source)


def build(out: Path, root: Path = ROOT) -> None:
    """Build the site into `out`. Raises GenAttnError when MkDocs warns, or is not installed."""
    gather(root / "build" / "site-source", root)
    link_package(root / "build" / "site-package", root)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out.resolve())]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise GenAttnError(f"the site must build without a warning, got:\n{done.stderr[-4000:]}")


def main(arguments: list[str] | None = None) -> None:
    """The command line of this page's first sentence."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    told = parser.parse_args(arguments)
    build(told.out)
    print(f"open {told.out}/index.html")


if __name__ == "__main__":
    main()
