"""Plugins as Python objects: copied, pickled into another process and printed as what they are set to."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import genattn
from genattn import NeighborhoodPattern, RadialPattern, Schedule
from genattn.errors import GenAttnError
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.nag.nag import NAG
from genattn.guidance.passes.delta import Projection
from genattn.guidance.s2.s2_guidance import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag.tag import TAG
from genattn.patterns.combine import Intersection, Union
from genattn.pipelines.tiny.random.build import build_model
from genattn.seam.plugin import Plugin
from genattn.seam.sparse_plugin import SparsePlugin


class Own(RadialPattern):
    """A pattern that no file names."""


PLUGINS: list[Plugin] = [
    SoftPAG("L0H1:0.3", scale=2.0, projection=Projection(eta=0.5), reuse_prefix=False),
    SoftPAG(HeadSet({(0, 1): 0.5}, {0: 4, 1: 4})),
    SoftPAG(per_sample=["L0", "L1"]),
    NAG("red", scale=3.0, share=False),
    BroadWay(0.3, energy="+20%", blocks=[1, "2-3"], conditional=(0.5, 1.0)),
    EnhanceAVideo(2.0, blocks=[1]),
    S2Guidance(seed=3),
    TAG(),
    SparsePlugin(NeighborhoodPattern((3, 5, 5)), Schedule(2, dense_layers=(0, 3)), "sdpa"),
]
WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda plugin: pickle.loads(pickle.dumps(plugin)),
    "pickle 2": lambda plugin: pickle.loads(pickle.dumps(plugin, 2)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plugin", PLUGINS, ids=repr)
def test_a_copy_is_fresh_and_set_alike(plugin: Plugin, way: str) -> None:
    found = WAYS[way](plugin)
    assert type(found) is type(plugin)
    assert found.settings() == plugin.settings()
    assert repr(found) == repr(plugin)
    kept = {name for name, value in vars(plugin).items() if type(value).__name__ == "WeakKeyDictionary"}
    assert all(vars(found)[name] is not vars(plugin)[name] for name in kept), "what is known of models is each one's own"


@pytest.mark.parametrize("plugin", PLUGINS, ids=repr)
def test_a_plugin_prints_its_settings(plugin: Plugin) -> None:
    told = {c.__name__: c for c in (*map(type, PLUGINS), Projection, Schedule, NeighborhoodPattern)}
    if type(plugin) is SoftPAG:  # heads sets and projections stand in it as a file holds them
        assert repr(plugin).startswith("SoftPAG(")
        return
    assert eval(repr(plugin), told).settings() == plugin.settings()


def test_encoded_texts_and_patterns_of_ones_own_are_kept() -> None:
    for way in WAYS.values():
        found = way(NAG(negative_embeds=torch.ones(1, 2, 3), scale=3.0, heads="L1"))
        assert torch.equal(found.embeds, torch.ones(1, 2, 3))
        assert (found.given["scale"], found.heads) == (3.0, "L1")
        assert type(way(SparsePlugin(Own())).pattern) is Own


def test_what_a_preset_told_is_kept() -> None:
    plugin = SparsePlugin(RadialPattern())
    plugin.origin = "wan-14b preset"
    assert [way(plugin).origin for way in WAYS.values()] == ["wan-14b preset"] * len(WAYS)


def test_a_plugin_without_settings_is_copied_as_python_does() -> None:
    plugin = Silent()
    plugin.number = 3  # type: ignore[attr-defined]
    assert copy.copy(plugin).number == 3  # type: ignore[attr-defined]
    assert repr(plugin).startswith(f"<{__name__}.Silent object")


class Silent(Plugin):
    """Names no settings."""


def test_a_copy_of_an_applied_plugin_is_on_no_model() -> None:
    model = build_model("wan")
    plugin = SoftPAG("L0H1")
    with genattn.apply(model, plugin):
        other = copy.deepcopy(plugin)
        assert len(plugin._models) == 1
        assert len(other._models) == 0


@pytest.mark.parametrize("kind", [Union, Intersection])
def test_combinations_are_made_again_from_their_fields(kind: Any) -> None:
    import dataclasses

    parts = (RadialPattern(), NeighborhoodPattern(3))
    pattern = kind(*parts, tail="mean")
    assert dataclasses.replace(pattern) == kind(patterns=parts, tail="mean") == pattern
    assert dataclasses.replace(pattern, tail=None) == kind(*parts, tail=None)
    assert eval(repr(pattern), {c.__name__: c for c in (kind, RadialPattern, NeighborhoodPattern)}) == pattern
    with pytest.raises(GenAttnError, match="patterns must be given one way, got .*; name them once"):
        kind(*parts, patterns=parts)
    with pytest.raises(GenAttnError, match="needs at least one pattern"):
        kind()


class Slotted:
    """Holds a model, and cannot be referred to weakly."""

    __slots__ = ("components",)

    def __init__(self, model: Any) -> None:
        self.components = {"transformer": model}


def test_targets_that_are_none() -> None:
    from diffusers import WanPipeline

    model = build_model("wan")
    for call in (lambda target: genattn.apply(target, RadialPattern()), lambda target: genattn.apply(target, "radial")):
        with pytest.raises(GenAttnError, match=r"got the class WanPipeline; make one first: WanPipeline.from_pretrained"):
            call(WanPipeline)
        with pytest.raises(GenAttnError, match="can be referred to weakly, got Slotted"):
            call(Slotted(model))
    with pytest.raises(GenAttnError, match="got the class WanPipeline"):
        genattn.remove(WanPipeline)
    with pytest.raises(GenAttnError, match=r"schedule must be a Schedule or None, got \{\}"):
        genattn.apply(model, RadialPattern(), schedule={})  # type: ignore[arg-type]
    assert genattn.remove(model) == 0
