"""Pictures: what is drawn is what the plan and the rule say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_checks import plan_codes as slow_codes

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.show import check_size, draw_pattern, plan_codes, terminal_pattern, visible_from

LAYOUT = TokenLayout.from_grid((6, 5, 7), text_after=4)


@pytest.mark.parametrize(
    "pattern", [RadialPattern(block=8), NeighborhoodPattern((3, 3, 3)), RadialPattern(decay=(0.1, 1.0), block=8)]
)
def test_codes_and_window_are_those_of_the_plan(pattern: RadialPattern | NeighborhoodPattern) -> None:
    plan = pattern.plan(LAYOUT, 16, 16)
    mask = pattern.mask(LAYOUT).view(-1, LAYOUT.seqlen, LAYOUT.seqlen)
    for head in range(plan.num_heads):
        assert np.array_equal(plan_codes(plan, head), slow_codes(plan)[head].numpy())
        seen = visible_from(pattern, LAYOUT, (2, 3, 4), head)
        token = (2 * 5 + 3) * 7 + 4
        assert np.array_equal(seen.reshape(-1), mask[head, token, :210].numpy())


def test_png_has_all_panels(tmp_path: Path) -> None:
    path = tmp_path / "radial.png"
    figure = draw_pattern(RadialPattern(block=8), LAYOUT, path, block=16, query=(1, 2, 3))
    assert path.read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0].startswith("tokens:")
    assert titles[1].startswith("tiles of 16 x 16")
    assert sum(t.startswith("frame") for t in titles) == 6
    long = draw_pattern(RadialPattern(), TokenLayout.from_grid((21, 30, 52)))
    assert not any(axes.get_title().startswith("tokens") for axes in long.axes)


def test_holes_are_marked() -> None:
    layout = TokenLayout.from_grid((16, 25, 40))
    figure = draw_pattern(RadialPattern(variant="official"), layout, kinds=["plan"])
    assert figure.axes[0].get_title() == "2 query tiles without a key (red)"


def test_content_adaptive_plans_are_drawn() -> None:
    x = torch.randn(1, LAYOUT.seqlen, 2, 8)
    pattern = BlockTopK(keep=0.2)
    plan = pattern.plan_for(x, x, LAYOUT, 16, 16)
    assert "density" in draw_pattern(pattern, LAYOUT, kinds=["plan"], plan=plan, head=1).axes[0].get_title()
    assert terminal_pattern(pattern, LAYOUT, plan=plan).count("▒") == 0


def test_terminal() -> None:
    text = terminal_pattern(DensePattern(), TokenLayout.from_grid((4, 4, 4)), block=16)
    assert text.splitlines()[:4] == ["████"] * 4
    assert text.splitlines()[-1] == "density 1.000, 100% of visited tiles need no mask, 4 x 4 tiles"
    wide = terminal_pattern(RadialPattern(block=16), TokenLayout.from_grid((40, 8, 8)), width=20, block=16).splitlines()
    assert len(wide) == 21
    assert all(len(line) == 20 for line in wide[:-1])
    assert {"█", "▒", "·"} >= set("".join(wide[:-1])) >= {"█", "·"}
    one = terminal_pattern(NeighborhoodPattern((1, 1, 1)), TokenLayout.from_grid((1, 4, 4)), block=4)
    assert one.splitlines()[0].count("·") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kinds": ["mask", "heat"]}, "kinds must be some of mask, plan, window"),
        ({"kinds": []}, "kinds must be some of"),
        ({"query": (6, 0, 0)}, "query must be .* inside"),
        ({"query": (0, 0)}, "query must be"),
    ],
)
def test_bad_requests(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        draw_pattern(DensePattern(), LAYOUT, **arguments)  # type: ignore[arg-type]


def test_bad_heads_widths_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenAttnError, match="head must be between 0 and 1, got 2"):
        draw_pattern(RadialPattern(decay=(0.1, 1.0)), LAYOUT, head=2)
    with pytest.raises(GenAttnError, match="width must be >= 1"):
        terminal_pattern(DensePattern(), LAYOUT, width=0)
    with pytest.raises(GenAttnError, match="needs a grid"):
        draw_pattern(DensePattern(), TokenLayout((Segment("text", (4,)),)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GenAttnError, match="pip install matplotlib"):
        draw_pattern(DensePattern(), LAYOUT)


def test_matplotlib_is_not_imported_before_it_is_used() -> None:
    code = "import genattn.planning.show, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((2000, 200, 200), 128, r"at most 67,108,864 tokens, got 80,000,000; draw a smaller grid"),
        (
            (100, 200, 200),
            128,
            r"at most 16,384 tiles a side, got 4,000,000 tokens in tiles of 128; take .* at least 245",
        ),
    ],
)
def test_a_grid_that_no_picture_can_hold_is_refused_before_anything_is_built(
    grid: tuple[int, ...], block: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RadialPattern, "build_plan", lambda *_: pytest.fail("a plan was built"))
    layout = TokenLayout.from_grid(grid)
    for draw in (draw_pattern, terminal_pattern):
        with pytest.raises(GenAttnError, match=message):
            draw(RadialPattern(), layout, block=block)
    check_size(TokenLayout.from_grid((100, 200, 200)), 245)
    check_size(TokenLayout.from_grid((64, 128, 256)), 128)  # as large as it may be
