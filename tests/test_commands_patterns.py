"""Commands that need geometry only."""

import json

import pytest

from genattn.apps.commands_patterns import parse_shape, simulate_command
from genattn.errors import GenAttnError


@pytest.mark.parametrize(("text", "shape"), [("7", (7,)), ("30x48x80", (30, 48, 80)), ("-1x4x16", (-1, 4, 16))])
def test_shapes(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape("--grid", text) == shape


@pytest.mark.parametrize("text", ["", "x", "3,4", "3x4x5x6", "3x"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(GenAttnError, match="--grid must be 1 to 3 whole numbers joined by x"):
        parse_shape("--grid", text)


def test_simulate_prints_the_published_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """GNA's HunyuanVideo row: window 18x24x24, stride 16x8x8, tiles 4x8x8 and 2x8x8 (arXiv 2504.16922)."""
    simulate_command(
        "30x48x80", "18x24x24", "16x8x8", tile_q="4x8x8", tile_k="2x8x8", block=128, attention_share=0.607, as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["worst_tile"] == pytest.approx(11.11, abs=0.02)
    assert found["end_to_end"][0] == pytest.approx(2.23, abs=0.02)
