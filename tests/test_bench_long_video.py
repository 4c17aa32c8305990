"""The ablation's bookkeeping: which films are there, and the table with its intervals."""

import csv

import numpy as np
import pytest

from genattn.apps import bench_long_video as bench


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    rows = []
    for prompt, values in (("a", (0.9, 0.8)), ("b", (0.7, 0.6)), ("c", (0.5, None))):
        for variant, value in zip(("FIFO", "+ tail"), values):
            if value is not None:
                row = dict.fromkeys(bench.MEASURES, str(value))
                rows.append({"variant": variant, "prompt": prompt, "model": "m", "frames": "61", "steps": "8", **row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_table_compares_the_same_prompts_with_intervals(table):
    rows = bench.summary(table)
    assert [(row["variant"], row["n"]) for row in rows] == [("FIFO", "2"), ("+ tail", "2")]
    mean, half = bench.interval([0.9, 0.7])
    assert rows[0]["motion_smoothness"] == f"{mean:.4f} ± {half:.4f}"
    assert mean == pytest.approx(0.8)
    assert half == pytest.approx(1.96 * np.std([0.9, 0.7], ddof=1) / 2**0.5)
    assert bench.interval([1.0]) == (1.0, float("inf"))


def test_films_that_are_there_are_not_made_again(table):
    assert bench._done("a", "m", 61, 8, table) == {"FIFO", "+ tail"}
    assert bench._done("c", "m", 61, 8, table) == {"FIFO"}
    assert bench._done("a", "other", 61, 8, table) == set()
    assert bench._done("a", "m", 61, 8, table.with_name("none.csv")) == set()


def test_each_variant_adds_one_part():
    for transformer in (True, False):
        chain = list(bench.variants(transformer).values())
        assert chain[0] is None
        assert chain[1].tail == "coherent"
        assert (chain[2].memory_frames > 0) == transformer
        assert chain[2].subject_attention != transformer
        assert chain[2].guidance == 0 < chain[3].guidance


def test_a_row_holds_every_measure_of_the_table():
    pytest.importorskip("cv2", reason="optical flow needs OpenCV")
    from genattn.pipelines.tiny_world import Scene, TinyObject, caption, render

    scene = Scene((TinyObject("red", "circle", "right"),), "dark")
    row = bench.film_row(render(scene), caption(scene))
    assert set(bench.MEASURES) <= set(row)
    assert row["oracle_colour"] == 1.0
