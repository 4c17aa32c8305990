"""The pages: links lead somewhere, examples run, command lines can be read, figures are made by code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from genattn.apps.cli import root as cli
from genattn.apps.pages.method_figures import IDEAS, main

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
METHODS = ("radial", "neighborhood", "softpag", "headhunter", "broadway", "long-video")
HOW_TO = ("write-a-pattern", "write-a-layout-adapter", "write-a-guider", "write-an-objective")


def code(page: Path, language: str = "python") -> list[str]:
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)  # a pair after a pair
    return [block for name, block in blocks if name == language]


def anchors(page: Path) -> set[str]:
    """GitHub's names of the headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which has no such heading"


def test_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "README"], ids=lambda page: page.name)
def test_pages_begin_with_what_they_are_for_and_end_with_their_limits(page: Path) -> None:
    title, first = [line for line in page.read_text().splitlines() if line.strip()][:2]
    assert title.startswith("# ")
    assert first[0].isalpha() or first[0] == "`", f"a page begins with a sentence, got {first!r}"
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^## (.+)$", prose, re.MULTILINE)[-1] == "Limits", "a page ends with its limits"


@pytest.mark.parametrize("name", METHODS)
def test_method_pages_have_one_form(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    wanted = ["Formula", "Settings", "Cost", "Source", "Limits"]
    assert [heading for heading in headings if heading in wanted] == wanted
    first = page.index("## Formula")
    assert "../assets/figures/" in page[:first], "the idea stands in a picture before the formula"


@pytest.mark.parametrize("name", HOW_TO)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_how_to_examples_run(name: str) -> None:
    (example,) = code(DOCS / f"{name}.md")
    assert len(example.splitlines()) <= 40
    exec(compile(example, f"{name}.md", "exec"), {"__name__": name.replace("-", "_")})  # the page's own lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_can_be_read(page: Path) -> None:
    for example in code(page):
        compile(example, page.name, "exec")


def command_lines() -> list[tuple[str, str]]:
    """Every `genattn ...` of the pages and model cards, in a block of code or within a sentence."""
    found = []
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "assets").glob("*/README.md"))):
        blocks = [block for language in ("", "bash", "sh") for block in code(page, language)]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        spans = re.findall(r"`(genattn [^`|]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
        lines += [part for span in spans for part in " ".join(span.split()).split("; ")]
        found += [(page.name, line.strip()) for line in lines if line.strip().startswith("genattn ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_can_be_read(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands") and not words[0].startswith("--"):
        assert words[0] in command.commands, f"{page}: {line}"
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known | {"--help"}, f"{page}: {line}"


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"REPOSITORY_URL|TODO|FIXME", page.read_text()), page.name


def test_figures_are_drawn_by_code(tmp_path: Path) -> None:
    drawn = main(tmp_path)
    assert [path.name for path in drawn] == list(IDEAS)
    for path in drawn:
        assert path.stat().st_size > 5000
        assert (ROOT / "assets" / "figures" / path.name).stat().st_size < 150_000
