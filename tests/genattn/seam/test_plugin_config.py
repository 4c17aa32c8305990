"""Settings that travel: versioned JSON, there and back, and clear refusals."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.configuration_utils
import diffusers.utils.hub_utils
import pytest
import torch

from genattn import GenAttnError, NeighborhoodPattern, RadialPattern, Schedule
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.nag import NAG
from genattn.guidance.passes.delta import Projection
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag import TAG
from genattn.layouts.site import AttentionSite
from genattn.pipelines.tiny.random.build import build_model
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin
from genattn.seam.plugin_config import PluginConfig
from genattn.seam.settings_file import FORMAT_VERSION, MODULES
from genattn.seam.sparse_plugin import SparsePlugin

SCHEDULE = Schedule(dense_steps=0.4, dense_last_steps=1, dense_layers=(0, 3), sigma=(0.1, 0.9), passes=("cond",), min_tokens=7)
NEIGHBORHOOD = NeighborhoodPattern(window_size=(3, 2, 4), stride=1)
HEADS = HeadSet({(0, 1): 0.5, (2, 0): 1.0}, {0: 2, 1: 2, 2: 2}, model="WanTransformer3DModel", scores={(0, 1): 0.25})

# every setting away from its default at least once
PLUGINS: dict[str, Plugin] = {
    "radial": SparsePlugin(RadialPattern(variant="paper", decay=0.7), SCHEDULE, "sdpa"),
    "nag": NAG("red", scale=4.0, tau=2.0, alpha=0.3, start=0.1, stop=0.8, heads="L0H1"),
    "s2": S2Guidance(0.3, 0.5, start=0.2, stop=0.7, keep=2, seed=5),
    "tag": TAG(1.3, 0.1, 0.6),
    "neighborhood": SparsePlugin(NEIGHBORHOOD),
    "softpag": SoftPAG(
        "L0H1,L2",
        u=0.25,
        scale=-1.5,
        target="mean_query",
        start=0.1,
        stop=0.7,
        sigma_start=0.9,
        sigma_stop=0.2,
        adaptive=0.3,
        rescale=0.4,
        projection=Projection(0.5, 15.0, -0.5),
        layout="uncond_cond",
        reuse_prefix=False,
    ),
    "softpag, pairs": SoftPAG([(0, 1), (2, 0)], mode="batched"),
    "softpag, weights": SoftPAG({(0, 1): 0.5, "L2H0": 1.0}),
    "softpag, head set": SoftPAG(HEADS),
    "softpag, per sample": SoftPAG(per_sample=["L0H1", [(1, 0)], {"L2H1": 0.5}]),
    "broadway": BroadWay(
        "auto",
        0.5,
        3.0,
        tau_frames=8,
        keep_energy=False,
        blocks=["1", 2],
        anchor="first",
        start=0.1,
        stop=0.6,
        sigma_start=0.9,
        sigma_stop=0.1,
        conditional=(0.0, 0.5),
        method="pooled",
        pool=3,
        keep_first_frame=True,
    ),
    "broadway, energy": BroadWay(energy="+20%", alpha=0.3),
    "enhance a video": EnhanceAVideo(3.4, blocks=["1-2"], start=0.1, stop=0.5, sigma_start=0.8, sigma_stop=0.1),
}


def written(tmp_path: Path, *plugins: Plugin) -> dict[str, Any]:
    PluginConfig.of(*plugins).save_pretrained(tmp_path)
    content: dict[str, Any] = json.loads((tmp_path / "genattn_config.json").read_text())
    return content


@pytest.mark.parametrize("name", list(PLUGINS))
def test_round_trip(tmp_path: Path, name: str) -> None:
    plugin = PLUGINS[name]
    content = written(tmp_path, plugin)
    assert content["format_version"] == FORMAT_VERSION
    (loaded,) = PluginConfig.from_pretrained(tmp_path).plugins()
    assert type(loaded) is type(plugin)
    assert loaded.settings() == plugin.settings() == {k: v for k, v in content["plugins"][0].items() if k != "type"}
    assert state(loaded) == state(plugin)


def state(plugin: Plugin) -> dict[str, Any]:
    """What the constructor made of its arguments; fresh containers that fill while running are all empty."""
    kept = {k: v for k, v in vars(plugin).items() if not k.startswith("_") and k not in ("report", "heads", "per_sample")}
    return {**kept, "heads": getattr(plugin, "settings", dict)().get("heads")}


def test_a_pattern_takes_the_schedule_and_backend_as_in_apply() -> None:
    patterns = (RadialPattern(), NEIGHBORHOOD)
    loaded = PluginConfig.of(*patterns, schedule=SCHEDULE, impl="sdpa").plugins()
    assert [plugin.pattern for plugin in loaded] == list(patterns)  # type: ignore[attr-defined]
    assert {(plugin.schedule, plugin.impl) for plugin in loaded} == {(SCHEDULE, "sdpa")}  # type: ignore[attr-defined]


def test_every_setting_is_saved() -> None:
    """A setting that a plugin gains later must not be forgotten in its saved form."""
    import inspect

    for plugin in PLUGINS.values():
        # NAG's encoded texts are tensors, which no file of settings holds: NAG.settings refuses them by name
        assert set(plugin.settings()) == set(inspect.signature(type(plugin)).parameters) - {"negative_embeds"}


def test_every_plugin_of_the_table_is_tried_here() -> None:
    assert {type(plugin).__name__ for plugin in PLUGINS.values()} == set(MODULES)


def test_loaded_plugins_can_be_applied(tmp_path: Path) -> None:
    written(tmp_path, SoftPAG(HEADS), PLUGINS["radial"])
    config = PluginConfig.from_pretrained(tmp_path)
    assert config.plugins()[0] is not config.plugins()[0]
    with apply(build_model("wan"), *config.plugins()) as handle:
        assert [plugin.describe()["plugin"] for plugin in handle.plugins] == ["SoftPAG", "SparsePlugin"]


RADIAL = {"type": "SparsePlugin", "pattern": {"type": "RadialPattern"}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"format_version": None}, "format_version must be 1, got None"),
        ({"shedule": {}}, r"unknown fields \['shedule'\]"),
        (
            {"plugins": [{"type": "os.system"}]},
            "type must be one of SparsePlugin, SoftPAG, NAG, S2Guidance, TAG, BroadWay, EnhanceAVideo, got 'os.system'",
        ),
        ({"plugins": [{"type": "SparsePlugin"}]}, "has pattern, schedule and impl"),
        ({"plugins": [{"type": "SparsePlugin", "pattern": {"type": "Nope"}}]}, "Nope"),
        ({"plugins": [{**RADIAL, "speed": 1}]}, r"unknown settings \['speed'\]; a SparsePlugin has pattern, schedule, impl"),
        ({"plugins": [{**RADIAL, "schedule": {"first": 1}}]}, r"unknown settings \['first'\]; a schedule has"),
        (
            {"plugins": [{"type": "SoftPAG", "heads": "L0", "no_such": 1}]},
            r"unknown settings \['no_such'\]; a SoftPAG has heads",
        ),
        ({"plugins": [{"type": "SoftPAG"}]}, "either heads or per_sample"),
        (
            {"plugins": [{"type": "SoftPAG", "heads": "L0", "projection": {"cap": 1}}]},
            "a projection has eta, norm_cap, momentum",
        ),
        ({"plugins": [{"type": "SoftPAG", "heads": {**HEADS.to_dict(), "version": 9}}]}, "must be of version 1, got 9"),
        ({"plugins": [{"type": "BroadWay", "alpha": 7}]}, r"alpha must be in \[0, 1\]"),
        ({"plugins": [{"type": "BroadWay", "gamma": 7}]}, r"unknown settings \['gamma'\]; a BroadWay has alpha, beta"),
    ],
)
def test_files_that_cannot_be_read_as_they_stand(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    content = written(tmp_path, PLUGINS["radial"])
    (tmp_path / "genattn_config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(GenAttnError, match=match):
        PluginConfig.from_pretrained(tmp_path)


def test_plugins_without_a_saved_form_are_refused() -> None:
    class Own(Plugin):
        pass

    class SoftPAG(Plugin):  # a namesake
        pass

    for plugin in (Own(), SoftPAG()):
        with pytest.raises(GenAttnError, match=f"{type(plugin).__name__} cannot be saved; plugins with a saved form are"):
            PluginConfig.of(plugin)
    with pytest.raises(GenAttnError, match="must name its settings; define settings"):
        Own().settings()


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_way_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Everything but the two calls that would go over the network."""
    created: list[str] = []
    uploaded: dict[str, Any] = {}

    def create(repo_id: str, **told: Any) -> Any:
        created.append(repo_id)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(repo_id: str, folder_path: str, **told: Any) -> str:
        uploaded.update({path.name: path.read_text() for path in Path(folder_path).iterdir()}, repo=repo_id, **told)
        return "url"

    for module in (diffusers.utils.hub_utils, diffusers.configuration_utils):
        monkeypatch.setattr(module, "create_repo", create)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload)
    monkeypatch.setattr(
        diffusers.utils.hub_utils, "load_or_create_model_card", lambda *a, **k: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(diffusers.utils.hub_utils, "populate_model_card", lambda card: card)
    config = PluginConfig.of(*PLUGINS.values())
    if how == "push_to_hub":
        assert config.push_to_hub("guided", token="t") == "url"
    else:
        config.save_pretrained(tmp_path / "guided", push_to_hub=True, token="t")
    assert created == ["guided"]
    assert (uploaded["repo"], uploaded["token"], uploaded["commit_message"]) == ("me/guided", "t", "Upload PluginConfig")
    there = tmp_path / "there"
    there.mkdir()
    (there / "genattn_config.json").write_text(uploaded["genattn_config.json"])
    again = PluginConfig.from_pretrained(there).plugins()
    assert [plugin.settings() for plugin in again] == [plugin.settings() for plugin in PLUGINS.values()]


def test_a_pattern_needs_attention_over_the_grid() -> None:
    sites = [AttentionSite("blocks.0.attn2", "blocks", 0, 0, "cross", 2)]
    with pytest.raises(GenAttnError, match="Module has no self or joint attention for a pattern; its sites are .*cross"):
        SparsePlugin(RadialPattern()).attach(torch.nn.Module(), sites)
