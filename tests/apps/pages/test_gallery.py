"""The pages of the patterns say what the code computes."""

from pathlib import Path

import pytest

from genattn.apps.pages.gallery import PAGES, TABLES, draw_all, fill_tables, main
from genattn.errors import GenAttnError

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(("page", "table"), [("radial.md", "holes"), ("neighborhood.md", "simulator")])
def test_quick_tables_are_current(page: str, table: str) -> None:
    text = (DOCS / page).read_text()
    assert fill_tables(text, [table]) == text


@pytest.mark.slow
def test_every_table_is_current() -> None:
    for page, tables in PAGES.items():
        text = (DOCS / page).read_text()
        assert fill_tables(text, tables) == text


def test_every_picture_is_there() -> None:
    for name, count in (("radial", 3), ("neighborhood", 2)):
        pictures = sorted((ROOT / "assets" / "figures").glob(f"{name}_*.png"))
        assert len(pictures) == count
        for picture in pictures:
            assert f"../assets/figures/{picture.name}" in (DOCS / f"{name}.md").read_text()
            assert picture.stat().st_size < 150_000


@pytest.mark.slow
def test_pages_and_pictures_are_made(tmp_path: Path) -> None:
    for page in PAGES:
        (tmp_path / page).write_text((DOCS / page).read_text().replace("0.287", "0.999"))
    main(str(tmp_path), str(tmp_path / "figures"))
    for page in PAGES:
        assert (tmp_path / page).read_text() == (DOCS / page).read_text()
    assert len(draw_all(tmp_path / "again")) == 5


def test_a_page_without_a_place() -> None:
    with pytest.raises(GenAttnError, match="no place for the table 'density'"):
        fill_tables("# nothing", ["density"])
    assert {table for tables in PAGES.values() for table in tables} == set(TABLES) == {"density", "holes", "simulator"}
