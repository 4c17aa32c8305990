"""docs/patterns.md says what the code computes."""

from pathlib import Path

import pytest

from genattn.errors import GenAttnError
from genattn.pattern_gallery import TABLES, draw_all, fill_tables, main

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "patterns.md"


def test_quick_tables_are_current() -> None:
    page = PAGE.read_text()
    assert fill_tables(page, ["holes", "simulator"]) == page


@pytest.mark.slow
def test_every_table_is_current() -> None:
    page = PAGE.read_text()
    assert fill_tables(page) == page


def test_every_picture_is_there() -> None:
    page = PAGE.read_text()
    pictures = sorted((ROOT / "assets" / "figures").glob("radial_*.png")) + sorted(
        (ROOT / "assets" / "figures").glob("neighborhood_*.png")
    )
    assert len(pictures) == 5
    for picture in pictures:
        assert f"../assets/figures/{picture.name}" in page
        assert picture.stat().st_size < 150_000


@pytest.mark.slow
def test_page_and_pictures_are_made(tmp_path: Path) -> None:
    page = tmp_path / "patterns.md"
    page.write_text(PAGE.read_text().replace("0.287", "0.999"))
    main(str(page), str(tmp_path / "figures"))
    assert page.read_text() == PAGE.read_text()
    assert len(draw_all(tmp_path / "again")) == 5


def test_a_page_without_a_place() -> None:
    with pytest.raises(GenAttnError, match="no place for the table 'density'"):
        fill_tables("# nothing", ["density"])
    assert set(TABLES) == {"density", "holes", "simulator"}
