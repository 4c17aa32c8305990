"""The architecture page's flow chart as a picture: read back whole, arrows downwards, nothing left to load."""

from pathlib import Path

import pytest

from genattn.apps.pages.rooms import LABORATORY, picture, read_rooms, without_implied
from genattn.apps.pages.site.flowchart import Chart, as_pictures, places, read
from genattn.errors import GenAttnError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def block() -> str:
    return picture(read_rooms(ROOT))


def test_all_of_it_is_read(block: str) -> None:
    chart, rooms = read("\n".join(block.splitlines()[1:-1])), read_rooms(ROOT)
    assert list(chart.groups) == ["apps/", "pipelines/", "guidance/", "genattn/", "kernels/"]
    assert sum(map(len, chart.groups.values())) == len(rooms) == len(chart.labels)
    arrows = without_implied({room.path: room.imports for room in rooms.values()})
    assert len(chart.arrows) == sum(map(len, arrows.values()))
    assert len(chart.dashed) == len([path for path in LABORATORY if path in rooms])


def test_arrows_lead_down(block: str) -> None:
    chart = read("\n".join(block.splitlines()[1:-1]))
    at = places(chart, tries=3)
    assert all(at[start][1] > at[to][1] for start, to in chart.arrows)
    assert all(0 < x < 1 for x, _ in at.values())
    assert len(set(at.values())) == len(at)


def test_the_fewest_nodes_in_the_way() -> None:
    """An arrow past one node in the middle: a drawn shift moves them apart."""
    chart = Chart({"g/": ["a", "b", "c"]}, dict.fromkeys("abc", "x"), [("a", "b"), ("b", "c"), ("a", "c")])
    at = places(chart)
    (x, _), (middle, _), (far, _) = at["a"], at["b"], at["c"]
    assert abs((x + far) / 2 - middle) > 0.06


def test_a_page_gets_a_picture(tmp_path: Path, block: str) -> None:
    shown = as_pictures(f"before\n\n{block}\n\nafter\n", "house", tmp_path)
    assert "mermaid" not in shown
    assert shown.startswith("before\n\n![Arrows lead down")
    assert shown.endswith("\n\nafter\n")
    (drawn,) = tmp_path.glob("house-*.svg")
    assert f"({tmp_path.name}/{drawn.name})" in shown
    for words in ("long_video/queue", "seam", "kernels/"):
        assert words in drawn.read_text()
    assert as_pictures("```python\n1\n```\n", "house", tmp_path) == "```python\n1\n```\n"


def test_another_kind_of_chart_is_refused() -> None:
    with pytest.raises(GenAttnError, match="has groups, nodes and arrows, got 'a -.-> b'; draw it otherwise"):
        read("flowchart TB\n a -.-> b\n")
