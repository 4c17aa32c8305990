"""Ouroboros' findings: paired by caption, on every model, and no gain while the oracle loses the subject."""

import csv

import pytest

from genattn.apps.pages.evidence_films import MEASURES, ORACLE, ouroboros_over_fifo, ouroboros_sacfa, ouroboros_tail
from genattn.apps.pages.evidence_tables import MINIATURE, NOT, NotMeasuredError, Tables


def _films(model, variant, **changes):
    """Three films whose measures are .5 to .52, changed by so much."""
    return [
        {"model": model, "base": model, "variant": variant, "prompt": str(i), "frames": 253}
        | {name: 0.5 + 0.01 * i + changes.get(name, 0.0) for name in (*MEASURES, ORACLE)}
        for i in range(3)
    ]


def _tables(folder, rows):
    with (folder / "long_video_ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Tables(folder)


@pytest.mark.parametrize(
    ("changes", "verdict", "why"),
    [
        ({"subject_consistency": 0.1}, MINIATURE, ""),
        ({}, NOT, "a: no interval excludes 0 with 3 films"),
        ({"subject_consistency": 0.1, "motion_smoothness": -0.1}, NOT, "a: motion smoothness fell"),
        ({"subject_consistency": 0.1, ORACLE: -0.1}, NOT, "a: oracle subject fell"),
    ],
)
def test_one_measure_must_rise_and_none_may_fall(tmp_path, changes, verdict, why):
    found = ouroboros_tail(_tables(tmp_path, _films("a", "FIFO") + _films("a", "+ tail", **changes)))
    assert (found.verdict, found.why) == (verdict, why)
    assert "a, 253 frames, 3 prompts, + tail minus FIFO" in found.measured
    assert len(found.rows) == 6


def test_the_whole_must_raise_every_measure(tmp_path):
    rise = dict.fromkeys(MEASURES, 0.1)
    films = _films("a", "FIFO") + _films("a", "+ guidance", **rise)
    assert ouroboros_over_fifo(_tables(tmp_path, films)).verdict == MINIATURE
    films = _films("a", "FIFO") + _films("a", "+ guidance", subject_consistency=0.1)
    assert ouroboros_over_fifo(_tables(tmp_path, films)).why == "a: only subject consistency rose"


def test_every_model_must_bear_it_out(tmp_path):
    films = _films("a", "+ tail") + _films("a", "+ SACFA", subject_consistency=0.1)
    films += _films("b", "+ tail") + _films("b", "+ memory frames")
    found = ouroboros_sacfa(_tables(tmp_path, films))
    assert "a, 253 frames, 3 prompts, + SACFA minus + tail" in found.measured
    assert "b, 253 frames, 3 prompts, + memory frames minus + tail" in found.measured
    assert (found.verdict, found.why) == (NOT, "b: no interval excludes 0 with 3 films")


def test_films_of_another_length_do_not_count(tmp_path):
    shorter = [row | {"frames": 61} for row in _films("a", "+ tail", subject_consistency=-0.3)]
    films = shorter + _films("a", "FIFO") + _films("a", "+ tail", subject_consistency=0.1)
    found = ouroboros_tail(_tables(tmp_path, films))
    assert found.verdict == MINIATURE
    assert len(found.rows) == 6


def test_too_few_films(tmp_path):
    films = _films("a", "FIFO")[:1] + _films("a", "+ tail")
    with pytest.raises(NotMeasuredError, match="fewer than 2 films of both"):
        ouroboros_tail(_tables(tmp_path, films))
