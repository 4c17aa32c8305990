"""The study of hunted heads on clips: who judges, what stands against the heads, where it goes on, and the table."""

import csv
from pathlib import Path

import pytest

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.pipelines.tiny.export import GenerationDefaults
from genattn.pipelines.tiny.studies import clip_heads
from genattn.pipelines.tiny.studies.clip_heads import ClipHeadStudy, StudySettings, compare, markdown

HEADS = HeadSet({(0, 1): 0.5, (2, 0): 0.5}, {0: 2, 1: 2, 2: 2}, model="WanTransformer3DModel")


def study(folder: Path, **settings: int) -> ClipHeadStudy:
    return ClipHeadStudy(None, GenerationDefaults(), StudySettings(**{"count": 4, "hunting": 3, "top_k": 2} | settings), folder)


def test_no_caption_both_hunts_and_judges(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert (len(found.hunting), len(found.judging)) == (3, 4)
    assert not set(found.hunting) & set(found.judging)


def test_controls_cost_what_the_heads_cost(tmp_path: Path) -> None:
    plugins = study(tmp_path, random_sets=3).plugins(HEADS, 1)
    assert list(plugins) == ["unguided", "cfg", "hunted", "layer", "random 0", "random 1", "random 2"]
    assert plugins["unguided"] is None
    assert plugins["cfg"] is None
    acting = [plugin for name, plugin in plugins.items() if plugin is not None and name != "hunted"]
    assert {(plugin.u, plugin.rule.scale) for plugin in acting} == {(0.5, 3.0)}
    drawn = [plugins[f"random {i}"].heads for i in range(3)]  # type: ignore[union-attr]
    assert all(len(set(heads)) == 2 for heads in drawn)  # type: ignore[arg-type]
    again = study(tmp_path, random_sets=3).plugins(HEADS, 1)
    assert drawn == [again[f"random {i}"].heads for i in range(3)]  # type: ignore[union-attr]


def test_judging_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def score(self: ClipHeadStudy, place: int, name: str, plugin: object) -> float:
        asked.append((place, name))
        return place + 0.5 * (name == "hunted")

    monkeypatch.setattr(ClipHeadStudy, "score", score)
    clock = iter([0.0, 1.0, 2.0, 61.0])
    monkeypatch.setattr(clip_heads.time, "monotonic", lambda: next(clock))
    plugins = {"unguided": None, "hunted": None}
    assert study(tmp_path).judge(plugins, minutes=1) == {"unguided": [0, 1], "hunted": [0.5, 1.5]}
    monkeypatch.setattr(clip_heads.time, "monotonic", lambda: 0.0)
    asked.clear()
    assert study(tmp_path).judge(plugins, minutes=1) == {"unguided": [0, 1, 2, 3], "hunted": [0.5, 1.5, 2.5, 3.5]}
    assert asked == [(2, "unguided"), (2, "hunted"), (3, "unguided"), (3, "hunted")]


def test_rows_are_paired_and_random_sets_are_one(tmp_path: Path) -> None:
    scores = {"unguided": [0.2, 0.4], "hunted": [0.5, 0.7], "random 0": [0.0, 1.0], "random 1": [0.4, 0.2]}
    rows = {row["condition"]: row for row in compare(scores)}
    assert list(rows) == ["unguided", "hunted", "2 random sets"]
    assert rows["unguided"]["hunted_minus"] == rows["unguided"]["minus_low"] == rows["unguided"]["minus_high"] == 0.3
    assert (rows["2 random sets"]["mean"], rows["2 random sets"]["captions"]) == (0.4, 2)
    with pytest.raises(GenAttnError, match="a comparison needs at least 2 captions, got 1; give it more minutes"):
        compare({"hunted": [1.0], "random 0": [1.0]})
    facts = {"device": "CPU", "torch": "2", "diffusers": "0", "date": "today", "commit": "abc", "model": "tiny-wan"}
    facts |= {"guidance_scale": 4.0, "heads": "L0H1 L2H0", "layer": 1}
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        shown = [{**facts, **row} for row in compare(scores | {"cfg": [0.1, 0.1]})]
        writer = csv.DictWriter(file, list(shown[0]))
        writer.writeheader()
        writer.writerows(shown)
    text = markdown(path)
    assert "| tiny-wan | CFG, scale 4 | 2 | 0.1 | +0.500 [+0.400, +0.600] |" in text
    assert "| tiny-wan | hunted: L0H1 L2H0 | 2 | 0.6 |  |" in text
    assert text.endswith("<sub>CPU, torch 2, diffusers 0, today, commit abc.</sub>")


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"count": 1}, {"hunting": 0}, {"probe": 2}, {"random_sets": 0}):
        with pytest.raises(GenAttnError, match="count must be >= 2, probe 0 or 1, all other numbers >= 1, got "):
            StudySettings(**wrong)
