"""docs/families.md says what the tables say, and every cell of them is filled."""

import diffusers
import pytest

from genattn.apps.laboratory.models import stock_testers
from genattn.apps.pages import family_table
from genattn.layouts.judged import judged
from genattn.pipelines.tiny.random.build import families
from genattn.pipelines.tiny.random.models import MODELS

ROWS = {row["family"]: row for row in family_table.read_rows()}


def test_the_page_is_what_the_tables_say() -> None:
    page = family_table.page([ROWS[name] for name in families()], stock_testers.read_rows())
    assert family_table.PAGE.read_text() == page, "run: python -m genattn.apps.pages.family_table --page"


@pytest.mark.parametrize("family", families())
def test_a_row_has_no_empty_cell(family: str) -> None:
    """A column that was not tried, or is refused, says so."""
    row = ROWS[family]
    assert not [column for column in family_table.COLUMNS if not row[column] and column not in ("note", *_without_grid(family))]
    assert row["removed_exactly"] == row["dense_bit_exact"] == "yes"
    if row["radial_density"][:1] == "0":
        assert float(row["radial_density"]) < 0.8
    if family != "sana":
        assert float(row["gna_density"]) < 0.8


def _without_grid(family: str) -> tuple[str, ...]:
    if family == "sana":
        return ("layout",)
    return () if MODELS[family].large else ("radial_density", "gna_density", "tail_runs")


def test_the_claim_counts_classes_whose_layout_was_tried() -> None:
    """A class is counted when a row of the table has its layout exact, or when its forward is that of such a class."""
    here = family_table.attention_models("transformers")
    exact = {row["model"] for row in ROWS.values() if row["layout_exact"] == "yes"}
    of_the_same_forward = {"ChronoEditTransformer3DModel"}
    assert family_table.counts() == (len(here & (exact | of_the_same_forward)), len(here))
    assert of_the_same_forward.isdisjoint(exact)
    assert here - exact - of_the_same_forward <= {*judged(), "SanaTransformer2DModel"}


@pytest.mark.parametrize(("file", "words"), [("CHANGELOG.md", "attention models"), ("docs/design.md", "transformer classes")])
def test_what_is_written_by_hand_has_the_same_count(file: str, words: str) -> None:
    known, total = family_table.counts()
    said = f"{known} of {total} {words} of diffusers {diffusers.__version__}"
    text = " ".join((family_table.ROOT / file).read_text().split())
    assert said in text, f"{file} must say: {said}"
