"""One file of settings: what is saved comes back, maps travel beside it, and what is not ours is refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest

import genattn
from genattn import GenAttnError, RadialPattern
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.as_json import save_pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.pipelines.tiny.random.build import build_model
from genattn.planning.fitted import FittedNeighborhood
from genattn.planning.ladder import ADAPTIVE
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import load_plugins, load_sparse, save_settings
from genattn.seam.sparse_plugin import SparsePlugin

ASSETS = Path(__file__).resolve().parents[3] / "assets"


@pytest.mark.parametrize("pattern", [RadialPattern(decay=0.2, floor=0), ADAPTIVE, FittedNeighborhood(0.25)])
def test_pattern_and_schedule_come_back(pattern: genattn.Pattern, tmp_path: Path) -> None:
    schedule = Schedule(dense_steps=3, dense_layers=(0, 2), sigma=(0.1, 0.9))
    save_settings(tmp_path / "s.json", [SparsePlugin(pattern, schedule, "sdpa")], {"from": "a test"})
    found = load_sparse(tmp_path / "s.json")
    assert (found.pattern, found.schedule, found.impl) == (pattern, schedule, "sdpa")
    assert json.loads((tmp_path / "s.json").read_text())["_notes"] == {"from": "a test"}


def test_a_map_travels_beside_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.copy(ASSETS / "maps" / "tiny-wan.safetensors", first / "map.safetensors")
    inside = SoftPAG("L0H0"), SparsePlugin(ProfiledPattern(str(first / "map.safetensors"), density=0.3))
    save_settings(first / "s.json", inside)
    first.rename(second)
    loaded = load_plugins(second / "s.json")[1]
    assert isinstance(loaded, SparsePlugin)
    assert loaded.pattern == ProfiledPattern(str(second / "map.safetensors"), density=0.3)


def test_a_map_elsewhere_keeps_its_path(tmp_path: Path) -> None:
    elsewhere = ProfiledPattern(str(ASSETS / "maps" / "tiny-wan.safetensors"))
    save_settings(tmp_path / "s.json", [SparsePlugin(elsewhere)])
    assert load_sparse(tmp_path / "s.json").pattern == elsewhere


def test_a_name_for_apply(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    save_settings(file, [SoftPAG("L0H0"), SparsePlugin(RadialPattern(), Schedule(dense_steps=5, dense_layers=2))])
    with genattn.apply(build_model("wan"), f"settings:{file}", dense_steps=1) as handle:
        softpag, sparse = handle.plugins
        assert isinstance(softpag, SoftPAG)
        assert isinstance(sparse, SparsePlugin)
        assert sparse.schedule == Schedule(dense_steps=1, dense_layers=2)  # what is given wins, the rest stays
        assert handle.report().plugins[1]["preset"] == f"settings:{file}"
    with genattn.apply(build_model("wan"), f"settings:{file}", schedule=Schedule(dense_steps=7), impl="sdpa") as handle:
        sparse = handle.plugins[1]
        assert isinstance(sparse, SparsePlugin)
        assert (sparse.schedule, sparse.impl) == (Schedule(dense_steps=7), "sdpa")


def test_a_pattern_file_is_read_too(tmp_path: Path) -> None:
    save_pattern(RadialPattern(decay=0.3), tmp_path / "p.json")
    found = load_sparse(tmp_path / "p.json")
    assert (found.pattern, found.schedule) == (RadialPattern(decay=0.3), Schedule())


REFUSED = [
    ("[]", "a settings file must hold"),
    ('{"plans": 3}', "a settings file must hold"),
    ("no json", "must be a readable JSON file"),
    ('{"format_version": 2, "plugins": []}', "format_version must be 1, got 2"),
    ('{"format_version": 1, "plugins": [], "more": 1}', r"unknown fields \['more'\]"),
    ('{"format_version": 1, "plugins": []}', "a list of at least one, got"),
    ('{"format_version": 1, "plugins": 3}', "a list of at least one, got 3"),
    ('{"format_version": 1, "plugins": [{"type": "os.system"}]}', "a plugin's type must be one of"),
    ('{"pattern": {"type": "Nonsense"}}', "a pattern's type must be one of"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_what_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(GenAttnError, match=says):
        load_plugins(tmp_path / "s.json")


def test_more_than_a_pattern_is_for_python(tmp_path: Path) -> None:
    save_settings(tmp_path / "s.json", [SoftPAG("L0H0")])
    with pytest.raises(GenAttnError, match="must hold one pattern here, and .* holds SoftPAG"):
        load_sparse(tmp_path / "s.json")
