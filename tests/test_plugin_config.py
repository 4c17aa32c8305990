"""Settings that travel: versioned JSON, there and back, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from genattn import GenAttnError, NeighborhoodPattern, RadialPattern, Schedule
from genattn.plugin import Plugin
from genattn.plugin_config import FORMAT_VERSION, PluginConfig
from genattn.sparse_plugin import SparsePlugin

SCHEDULE = Schedule(dense_steps=0.4, dense_last_steps=1, dense_layers=(0, 3), sigma=(0.1, 0.9), passes=("cond",), min_tokens=7)


def test_round_trip(tmp_path: Path) -> None:
    patterns = (RadialPattern(variant="paper", decay=0.7), NeighborhoodPattern(window_size=(3, 2, 4), stride=1))
    PluginConfig.of(*patterns, schedule=SCHEDULE, impl="sdpa").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "genattn_config.json").read_text())
    assert written["format_version"] == FORMAT_VERSION
    loaded = PluginConfig.from_pretrained(tmp_path).plugins()
    assert all(isinstance(plugin, SparsePlugin) for plugin in loaded)
    assert tuple(plugin.pattern for plugin in loaded) == patterns  # type: ignore[attr-defined]
    assert {plugin.schedule for plugin in loaded} == {SCHEDULE}  # type: ignore[attr-defined]
    assert {plugin.impl for plugin in loaded} == {"sdpa"}  # type: ignore[attr-defined]


def test_loading_gives_fresh_plugins(tmp_path: Path) -> None:
    config = PluginConfig.of(RadialPattern())
    assert config.plugins()[0] is not config.plugins()[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"format_version": None}, "format_version must be 1, got None"),
        ({"shedule": {}}, r"unknown fields \['shedule'\]"),
        ({"plugins": [{"type": "os.system"}]}, "type must be SparsePlugin"),
        ({"plugins": [{"type": "SparsePlugin"}]}, "has pattern, schedule and impl"),
        ({"plugins": [{"type": "SparsePlugin", "pattern": {"type": "Nope"}}]}, "Nope"),
        ({"plugins": [{"type": "SparsePlugin", "pattern": {"type": "RadialPattern"}, "speed": 1}]}, "speed"),
        (
            {"plugins": [{"type": "SparsePlugin", "pattern": {"type": "RadialPattern"}, "schedule": {"first": 1}}]},
            r"unknown settings \['first'\]",
        ),
        ({"plugins": [{"type": "SoftPAG", "no_such_setting": 1}]}, "settings of SoftPAG"),
    ],
)
def test_files_that_cannot_be_read_as_they_stand(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    PluginConfig.of(RadialPattern()).save_pretrained(tmp_path)
    path = tmp_path / "genattn_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(GenAttnError, match=match):
        PluginConfig.from_pretrained(tmp_path)


def test_plugins_without_a_saved_form_are_refused() -> None:
    class Own(Plugin):
        pass

    with pytest.raises(GenAttnError, match="Own cannot be saved"):
        PluginConfig.of(Own())
