"""docs/families.md says what the tables say, every cell of them is filled, and what compiling costs is bounded."""

import time
from typing import Any

import pytest
from torch import nn

from genattn.apps.laboratory.models import stock_testers
from genattn.apps.pages import family_table
from genattn.pipelines.tiny.random.build import build_model, families
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


def test_what_takes_too_long_is_left_and_told() -> None:
    def spin() -> str:
        while True:
            try:
                sum(range(1000))
            except Exception:  # as Dynamo does
                continue

    began = time.process_time()
    assert family_table._within(0.2, spin) == "not tried: tracing took longer than 0.2 s on one core"
    assert time.process_time() - began < 5
    assert family_table._within(5, lambda: "yes") == "yes"


@pytest.mark.parametrize("family", ["wan", "allegro", "unet", "latte", "hunyuan-dit"])
def test_blocks_are_those_that_attend(family: str) -> None:
    """At least one for every stack, none inside another, and none of the whole model."""
    model = build_model(family)
    blocks = family_table._blocks(model)
    assert blocks
    assert model not in blocks
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not [block for block in blocks if id(block) in inside]
    sites = family_table.apply_sites(model)
    held: list[Any] = [part for block in blocks for part in block.modules() if hasattr(part, "processor")]
    assert len(held) >= len(sites)
    assert all(isinstance(block, nn.Module) for block in blocks)
