"""Head sets: files that come back the same, set algebra, and refusal of other models and versions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet

LAYERS = {0: 4, 1: 4}


def make(heads: object = "L0H1:0.5,L1H3", **settings: object) -> HeadSet:
    return HeadSet.from_names(heads, LAYERS, model="SD3Transformer2DModel", **settings)


def test_a_file_comes_back_the_same(tmp_path: Path) -> None:
    found = make(scale=5.0, stop=0.5, objective="sharpness", scores={(0, 1): 1.5, (1, 2): -0.5}, notes={"rounds": 2})
    assert HeadSet.load(found.save(tmp_path / "set.json")) == found


def test_equal_sets_are_one_in_a_set() -> None:
    first, same = make("L0H1:0.5,L1H3", notes={"a": [1]}), make("L1H3,L0H1:0.5", notes={"a": [1]})
    assert first == same
    assert len({first, same}) == 1
    assert len({first, make("L0H1:0.25,L1H3"), make(scale=2.0), make(stop=0.5), make(target="mean")}) == 5


def test_union_and_difference() -> None:
    first, second = make("L0H1:0.5,L1H3:0.2"), make("L0H1:0.75,L1H0")
    assert (first | second).heads == {(0, 1): 0.75, (1, 0): 1.0, (1, 3): 0.2}
    assert (first - second).heads == {(1, 3): 0.2}
    with pytest.raises(GenAttnError, match="at least one head"):
        first - first


def test_top_and_with_u() -> None:
    found = make(scores={(0, 1): 1.0, (1, 3): 2.0})
    assert found.top(1).heads == {(1, 3): 1.0}
    assert set(found.with_u(0.25).heads.values()) == {0.25}
    with pytest.raises(GenAttnError, match="a score for every head"):
        replace(found, scores={}).top(1)


def test_refuses_another_model() -> None:
    make().check_model(LAYERS, "SD3Transformer2DModel")
    with pytest.raises(GenAttnError, match="L0-1 with heads H0-7 each"):
        make().check_model({0: 8, 1: 8})
    with pytest.raises(GenAttnError, match="WanTransformer3DModel"):
        make().check_model(LAYERS, "WanTransformer3DModel")
    with pytest.raises(GenAttnError, match="same layers"):
        make() | HeadSet.from_names("L0H1", {0: 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must be of version 1, got 2"),
        ({"format": "other"}, "must have format"),
        ({"heads": {"L9H0": 1.0}}, "L0-1"),
        ({"heads": {"L0": 1.0}}, "needs heads and layer_map"),
        ({"layer_map": None}, "needs heads and layer_map"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"start": 0.7, "stop": 0.5}, "start <= stop"),
    ],
)
def test_refuses_files(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps({**make().to_dict(), **change}))
    with pytest.raises(GenAttnError, match=message):
        HeadSet.load(path)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="readable JSON file"):
        HeadSet.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GenAttnError, match="readable JSON file"):
        HeadSet.load(tmp_path / "broken.json")
    with pytest.raises(GenAttnError, match="must have format"):
        HeadSet.from_dict([])


@pytest.mark.parametrize("notes", [{"at": Path()}, {"score": float("nan")}])
def test_notes_that_json_does_not_hold_are_refused(tmp_path: Path, notes: dict) -> None:
    with pytest.raises(GenAttnError, match="notes of a head set must be what JSON holds, got others .*; leave them out"):
        replace(make(), notes=notes).save(tmp_path / "set.json")
    assert not list(tmp_path.iterdir())
