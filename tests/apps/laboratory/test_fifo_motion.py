"""The study of why motion stops in a queue: its captions, its measure and its tables."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genattn.apps.laboratory import fifo_motion as lab
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.pipelines.tiny.world import ENDLESS, Scene, TinyObject, caption, render

ORBIT = Scene((TinyObject("red", "circle", "orbits"),), "dark")
RIGHT = Scene((TinyObject("red", "circle", "right"),), "dark")


def test_captions_that_turn_round_and_those_that_cannot() -> None:
    told = lab.there_and_back("a red circle moves up on a dark background", 60)
    assert [told[start].split()[4] for start in (0, 29, 58)] == ["up", "down", "up"]
    assert lab.there_and_back("a red circle orbits on a dark background", 60) == {0: "a red circle orbits on a dark background"}


@pytest.mark.parametrize(("kind", "words"), [("straight", {"left", "right", "up", "down"}), ("orbits", {"orbits"})])
def test_the_first_held_out_scenes_of_a_kind(kind: str, words: set[str]) -> None:
    found = lab.moving(kind, 5)
    assert len(found) == 5
    assert {scene.objects[0].motion for _, scene in found} <= words
    assert [seed for seed, _ in found] == sorted(seed for seed, _ in found)
    assert lab.moving(kind, 2) == found[:2]


def test_the_path_is_that_of_the_subject_and_a_cut_is_none() -> None:
    clip = render(RIGHT, 51, 64, 64)  # .45 of a side in 50 steps
    whole, second = lab.travel(clip)
    assert abs(whole - 0.9) < 0.06
    assert abs(second - 0.9) < 0.06
    standing = np.concatenate([clip, np.repeat(clip[-1:], 50, 0)])
    whole, second = lab.travel(standing)
    assert abs(whole - 0.45) < 0.06
    assert second < 0.03
    begun_anew = np.concatenate([clip, clip])  # the jump back is a cut
    assert abs(lab.travel(begun_anew)[0] - 0.9) < 0.06
    assert lab.travel(np.zeros_like(clip)) == (0.0, 0.0)


def test_an_orbit_is_told_from_a_straight_path_and_changes_are_paired(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"

    def row(variant: str, prompt: str, motion: str, second: float) -> dict[str, object]:
        kept = dict.fromkeys(lab.KEPT, 0.5)
        films = {"base": "tiny", "frames": 9, "steps": 2, "model": "m", "travel": 1.0, "travel_second_half": second}
        return {"variant": variant, "prompt": prompt, "motion": motion, **films, **kept, **provenance("cpu")}

    append_rows(table, [row("FIFO", p, "orbits", v) for p, v in (("a", 1.0), ("b", 3.0), ("only here", 9.0))])
    append_rows(table, [row("eta 1", p, "orbits", v) for p, v in (("b", 3.5), ("a", 1.5))])
    append_rows(table, [row("FIFO", "c", "left", 0.2), row("eta 1", "c", "left", 0.1)])
    cells = [line.strip("| ").split(" | ") for line in lab.motion_markdown(table).split("\n")[2:-2]]
    assert [line[1:4] for line in cells] == [
        ["straight", "FIFO", "1"],
        ["straight", "eta 1", "1"],
        ["orbits", "FIFO", "2"],
        ["orbits", "eta 1", "2"],
    ]
    assert [line[5:7] for line in cells[2:]] == [["2.00 [1.00, 3.00]", "-"], ["2.50 [1.50, 3.50]", "+0.50 [+0.50, +0.50]"]]
    assert cells[1][6] == "-0.10"


def test_films_are_made_once_and_a_caption_that_cannot_turn_is_not_told_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, made = tmp_path / "rows.csv", []

    def makers(pipe: object, prompt: str, *_: object) -> dict[str, object]:
        return {name: lambda n=name: made.append(n) or render(ORBIT, 29, 64, 64) for name in ("chunked", "FIFO")}

    monkeypatch.setattr(lab, "_makers", makers)
    for only in (["FIFO"], None, None):
        lab.run(motion="orbits", prompts=1, only=only, frames=29, steps=2, table=table)
    assert made == ["FIFO", "chunked"]
    monkeypatch.undo()
    monkeypatch.setattr(lab, "frame_denoiser", lambda pipe: SimpleNamespace(default_window=lambda: 8))
    named = {p: set(lab._makers(None, p, 0, 60, 4)) for p in ("a ring orbits", "a ring moves up")}
    assert named["a ring moves up"] - named["a ring orbits"] == {"motion told anew"}
    assert {"chunked", *lab.variants(8, 4)} == named["a ring moves up"]


def test_motions_that_go_on_are_a_kind_of_their_own_with_a_table_of_their_own(tmp_path: Path) -> None:
    found = lab.moving("goes on", 6)
    assert {scene.objects[0].motion for _, scene in found} <= set(ENDLESS)
    for motion in ENDLESS:
        text = caption(Scene((TinyObject("red", "circle", motion),), "dark"))
        assert lab.there_and_back(text, 90) == {0: text}
    table = tmp_path / "rows.csv"

    def row(base: str, variant: str, degree: float) -> dict[str, object]:
        films = {"base": base, "frames": 9, "steps": 2, "model": "m", "travel": 1.0, "travel_second_half": 1.0}
        kept = dict.fromkeys(lab.KEPT, 0.5) | {"dynamic_degree": degree}
        return {"variant": variant, "prompt": "a", "motion": "sways", **films, **kept, **provenance("cpu")}

    append_rows(table, [row("tiny + LoRA", "chunked", 4.0), row("tiny + LoRA", "FIFO", 3.0), row("tiny", "FIFO", 1.0)])
    lines = [line.strip("| ").split(" | ") for line in lab.motion_markdown(table, lora=True).split("\n")[2:-2]]
    assert [(line[0], line[1], line[2], *line[7:9]) for line in lines] == [
        ("tiny + LoRA", "goes on", "chunked", "4.00", "-"),
        ("tiny + LoRA", "goes on", "FIFO", "3.00", "0.75"),
    ]
    assert "LoRA" not in lab.motion_markdown(table)


def test_a_lora_is_on_the_model_for_all_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(lab, "add_loras", lambda pipe, texts: seen.append(texts))
    monkeypatch.setattr(lab, "_makers", lambda *_: {"FIFO": lambda: render(ORBIT, 29, 64, 64)})
    table = tmp_path / "rows.csv"
    lab.run(motion="orbits", prompts=1, frames=29, steps=2, table=table, lora="a.safetensors")
    assert seen == [["a.safetensors"]]
    assert " + LoRA," in table.read_text()
