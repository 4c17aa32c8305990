"""The rooms as they are read from source: words, arrows, circles, and the picture without implied arrows."""

from pathlib import Path

import pytest

from genattn.apps.pages import rooms
from genattn.errors import GenAttnError

SOURCES = {
    "kernels/block.py": "import torch\n",
    "kernels/plan/__init__.py": '"""What a kernel eats."""\n',
    "kernels/plan/tiles.py": "x = 1\n",
    "genattn/errors.py": "",
    "genattn/seam/__init__.py": '"""The seam.\n\nMore."""\n',
    "genattn/seam/mark.py": "from genattn.errors import X\n\ndef f():\n    from genattn.kernels.plan import tiles\n",
    "apps/cli/__init__.py": '"""Commands."""\n',
    "apps/cli/root.py": "import genattn.seam.mark\nfrom genattn.kernels.plan.tiles import x\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_words_and_arrows(house: Path) -> None:
    found = rooms.read_rooms(house)
    assert list(found) == ["kernels", "kernels/plan", "genattn", "genattn/seam", "apps/cli"]
    seam = found["genattn/seam"]
    assert (seam.about, seam.files) == ("The seam.", 2)
    assert seam.imports == {"genattn", "kernels/plan"}  # the one inside a function counts too
    assert found["apps/cli"].imports == {"genattn/seam", "kernels/plan"}
    assert found["kernels"].imports == set()


def test_circles_are_found_however_long() -> None:
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_implied_arrows_are_left_out_and_nothing_else() -> None:
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    kept = rooms.without_implied(arrows)
    assert kept == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert {room: rooms.reachable(kept, room) for room in arrows} == {room: rooms.reachable(arrows, room) for room in arrows}


def test_picture_and_table(house: Path) -> None:
    (house / "apps/laboratory").mkdir()
    (house / "apps/laboratory/try.py").write_text("from genattn.apps.cli import root\n")
    found = rooms.read_rooms(house)
    picture = rooms.picture(found)
    assert "apps_cli_room --> genattn_seam_room" in picture
    assert "apps_cli_room --> kernels_plan_room" not in picture  # the seam imports it
    assert "class apps_laboratory_room laboratory" in picture
    table = rooms.table(found).splitlines()
    assert "| `genattn/seam/` | The seam. | `genattn`, `kernels/plan` |" in table
    assert table[-1].startswith("| `apps/laboratory/` (not in the wheel) |")


def test_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="the rooms are read from a checkout, and .* has none of kernels"):
        rooms.read_rooms(tmp_path)
