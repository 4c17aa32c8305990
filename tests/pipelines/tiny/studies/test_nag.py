"""The studies of NAG, S2-Guidance and TAG: what is asked, what is counted, and a whole small run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.studies import nag, probe, small_guidance
from genattn.pipelines.tiny.world import Scene, TinyObject, render

SCENE = Scene((TinyObject("red", "circle", "right", "large"),), "dark")


def test_one_attribute_is_left_open() -> None:
    assert nag.open_caption(SCENE, "colour") == "a large circle moves right on a dark background"
    assert nag.open_caption(SCENE, "shape") == "a large red moves right on a dark background"
    assert nag.open_caption(SCENE, "motion") == "a large red circle on a dark background"
    assert nag.negative_word("motion", "up") == "moves up"
    assert nag.negative_word("colour", "blue") == "blue"


def test_a_value_is_named_alone_or_in_the_captions_own_sentence() -> None:
    assert nag.negative_text(SCENE, "shape", "ring", "word") == "ring"
    assert nag.negative_text(SCENE, "shape", "ring", "sentence") == "a large red ring moves right on a dark background"
    assert nag.negative_text(SCENE, "motion", "up", "sentence") == "a large red circle moves up on a dark background"


def test_reads_what_is_there() -> None:
    seen = nag.read(render(SCENE, 9))
    assert seen == {"colour": "red", "shape": "circle", "motion": "right", "background": "dark"}
    assert nag.read(render(SCENE, 1))["motion"] is None
    assert set(nag.read(np.full((3, 64, 64, 3), 24, np.uint8)).values()) == {None}


def test_counts_named_values_and_the_rest() -> None:
    def read(colour: str, shape: str = "circle") -> dict[str, Any]:
        return {"colour": colour, "shape": shape, "motion": None, "background": "dark"}

    plain = [read("red"), read("red")]
    guided = {
        (0, "red"): read("blue"),
        (0, "blue"): read("red", "square"),
        (1, "red"): read("red"),
        (1, "blue"): read("red"),
    }
    row = nag.compare([SCENE, SCENE], plain, guided, "colour", ("red", "blue"), ("shape", "background"))
    assert (row["captions"], row["values"]) == (2, 2)
    assert row["named_without"] == 0.5  # red is there for one of two names
    assert row["named_with"] == 0.25
    assert row["difference"] == -0.25
    assert row["rest_without"] == 1.0
    assert row["rest_with"] == 0.875
    assert row["difference_low"] <= -0.25 <= row["difference_high"]


def test_gains_are_paired() -> None:
    table = {"unguided": np.array([0.5, 1.0]), "hunted heads": np.array([1.0, 1.0]), "TAG": np.array([0.5, 0.5])}
    rows = {row["condition"]: row for row in small_guidance.rows_of(table)}
    assert rows["TAG"]["minus_unguided"] == -0.25
    assert rows["TAG"]["minus_hunted"] == -0.5
    assert rows["hunted heads"]["minus_unguided"] == 0.25
    assert rows["unguided"]["unguided_low"] == rows["unguided"]["unguided_high"] == 0.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"count": 1}, "count must be >= 2"),
        ({"steps": 0}, "steps, batch"),
        ({"naming": "letter"}, "naming must be word or sentence"),
        ({"first_seed": 5}, "first_seed >= 1000000"),
    ],
)
def test_refuses(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(GenAttnError, match=match):
        nag.StudySettings(**settings)


def test_looks_of_the_probe_come_at_equal_captions_and_at_equal_cost() -> None:
    every = probe.variants(40)
    assert {moments for moments, captions in every if captions == 40} == set(probe.LOOKS)
    assert all(len(moments) * captions <= 40 for moments, captions in every if captions < 40)
    assert sum(captions < 40 for _, captions in every) == sum(len(moments) > 1 for moments in probe.LOOKS)


def test_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="must be a tiny pipeline's folder"):
        nag.load(tmp_path)


def test_a_small_run(tmp_path: Path) -> None:
    table = tmp_path / "nag.csv"
    nag.main(["--model", "assets/tiny-sd3", "--csv", str(table), "--count", "2", "--steps", "1", "--batch", "12"])
    lines = table.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("rest_low,rest_high")
