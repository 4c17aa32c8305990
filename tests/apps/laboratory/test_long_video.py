"""The ablation's bookkeeping: which films are there, and the table with its intervals."""

import csv

import numpy as np
import pytest
import video_pipes

from genattn.apps.laboratory import long_video as bench


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    rows = []
    for prompt, values in (("a", (0.9, 0.8)), ("b", (0.7, 0.6)), ("c", (0.5, None))):
        for variant, value in zip(("FIFO", "+ tail"), values):
            if value is not None:
                row = dict.fromkeys(bench.MEASURES, str(value))
                rows.append(
                    {
                        "variant": variant,
                        "prompt": prompt,
                        "model": "m",
                        "frames": "61",
                        "steps": "8",
                        "latents_per_level": "1",
                        **row,
                    }
                )
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


def test_a_change_is_told_against_the_papers_direction():
    low, high = [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.31, 0.4, 0.51, 0.6]
    assert bench.verdict(low, high, rises=True).startswith("follows (+0.1")
    assert bench.verdict(high, low, rises=True).startswith("does not follow (-0.1")
    assert bench.verdict(low, low[::-1], rises=True).startswith("no clear change")
    assert bench.verdict(low[:4], high[:4], rises=True) == "too few films (4)"


def test_the_manuals_table_has_a_column_per_variant_and_the_papers_numbers(table):
    page = bench.ablation_markdown(_with_provenance(table))
    lines = page.splitlines()
    assert lines[0].startswith("| measure | FIFO | + tail | paper")
    subject = next(line for line in lines if line.startswith("| subject consistency"))
    assert "94.04, 95.56, 95.71, 96.06" in subject
    assert next(line for line in lines if line.startswith("| dynamic degree")).count("not reported") == 1
    assert "2 held-out captions" in lines[-1]


def _with_provenance(table):
    from genattn.apps.sampling.measured_rows import append_rows, provenance

    with table.open(newline="") as file:
        append_rows(table.with_name("full.csv"), [{**row, **provenance("cpu")} for row in csv.DictReader(file)])
    return table.with_name("full.csv")


def test_a_film_that_was_stopped_makes_no_row(monkeypatch):
    from types import SimpleNamespace

    from genattn.errors import GenAttnError

    monkeypatch.setattr(bench, "long_video", lambda *a, **k: SimpleNamespace(stopped="interrupted", frames=3, video=None))
    with pytest.raises(GenAttnError, match="interrupted after 3 of 61 frames"):
        list(bench.films(SimpleNamespace(), "a", "a", 0, 61, 8, {"chunked"}))


@pytest.mark.parametrize("family", ["animatediff", "wan"])
def test_every_film_of_the_ablation_is_made_on_both_routes(family):
    size, frames, clip = (16, 7, 3) if family == "animatediff" else (32, 25, 9)
    pipe = getattr(video_pipes, family)()
    from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser

    told = {"height": size, "width": size, "frames": clip, "guidance_scale": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameDenoiser, "shipped", lambda self: told)
        films = {name: video for name, video, _ in bench.films(pipe, "a red cat", "red cat", 0, frames, 3, set())}
    third = "+ SACFA" if family == "animatediff" else "+ memory frames"
    assert list(films) == ["chunked", "FIFO", "+ tail", third, "+ guidance"]
    assert all(video.shape == (frames, size, size, 3) for video in films.values())
    assert not np.array_equal(films["FIFO"], films["+ tail"])
    assert not np.array_equal(films["+ tail"], films["+ guidance"])


def test_films_that_are_there_are_not_made_again(table):
    assert bench._done("a", "m", 61, 8, 1, table) == {"FIFO", "+ tail"}
    assert bench._done("c", "m", 61, 8, 1, table) == {"FIFO"}
    assert bench._done("a", "m", 61, 8, 2, table) == set(), "two latents at a level are another queue"
    assert bench._done("a", "other", 61, 8, 1, table) == set()
    assert bench._done("a", "m", 61, 8, 1, table.with_name("none.csv")) == set()


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
    from genattn.pipelines.tiny.world import Scene, TinyObject, caption, render

    scene = Scene((TinyObject("red", "circle", "right"),), "dark")
    row = bench.film_row(render(scene), caption(scene))
    assert set(bench.MEASURES) <= set(row)
    assert row["oracle_colour"] == 1.0
