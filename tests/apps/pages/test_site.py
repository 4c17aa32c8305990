"""The site: links turned, all pages listed, and, with MkDocs, built without a warning or an outside request."""

import importlib.util
import re
from pathlib import Path

import pytest

from genattn.apps.pages.site import build as site

ROOT = Path(__file__).resolve().parents[3]


def test_links_lead_to_the_site_or_become_words() -> None:
    page = ROOT / "docs" / "radial.md"
    text = "[a](tail.md#cost) ![b](../assets/figures/idea_softpag.png) [c](../genattn/errors.py) [d](../README.md) [e](https://x.org)"
    wanted = "[a](tail.md#cost) ![b](pictures/idea_softpag.png) c [d](index.md) [e](https://x.org)"
    assert site.turned(text, page) == wanted
    block = "```\n[c](../genattn/errors.py)\n```"
    assert site.turned(block, page) == block


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    own = {f"reference-{name.replace(' ', '-')}.md" for name in site.REFERENCE}
    assert listed == pages | own | {"documentation.md", "index.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_pages_are_gathered(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.png").write_bytes(b"")
    for name in (*site.ROOT_PAGES, "docs/README.md", "docs/tail.md"):
        (tmp_path / name).write_text("# x\n")
    written = {path.name for path in site.gather(tmp_path / "out", tmp_path)}
    assert {"index.md", "documentation.md", "tail.md", "reference-patterns.md"} <= written
    assert (tmp_path / "out" / "pictures" / "a.png").is_file()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="building the site needs the extra `docs`")
def test_the_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    site.build(tmp_path / "site")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"']?(https?://[^\"' >]+)", text)
        loaded += re.findall(
            r"<link[^>]+rel=[\"']?(?:stylesheet|preconnect|icon)[\"']?[^>]+href=[\"']?(https?://[^\"' >]+)", text
        )
        assert loaded == [], page.name
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet.name


def test_a_warning_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from genattn.errors import GenAttnError

    monkeypatch.setattr(site, "gather", lambda *args: [])
    monkeypatch.setattr(site, "link_package", lambda *args: None)
    monkeypatch.setattr(site.subprocess, "run", lambda *args, **more: SimpleNamespace(returncode=1, stderr="WARNING x"))
    with pytest.raises(GenAttnError, match="without a warning, got:\nWARNING x"):
        site.build(tmp_path)
