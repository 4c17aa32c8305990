"""The study's own arithmetic and plumbing, on a pipeline that draws instead of denoising."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.guidance.broadway.broadway import BroadWay
from genattn.pipelines.tiny.animatediff_card import write_motion_card
from genattn.pipelines.tiny.evaluate import evaluation_scenes
from genattn.pipelines.tiny.export import GenerationDefaults
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.pipelines.tiny.studies import broadway as tiny
from genattn.pipelines.tiny.world import caption, parse_caption, render

SIZE = GenerationDefaults(height=64, width=64, frames=8, steps=2, fps=8)


class Drawing:
    """Answers a caption with its clip; `slow` stops the motion."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow
        self.seeds: list[int] = []

    def __call__(self, prompt: list[str], generator: list[Any], num_frames: int, **rest: Any) -> SimpleNamespace:
        self.seeds += [g.initial_seed() for g in generator]
        clips = [render(parse_caption(text), num_frames, 64, 64) for text in prompt]
        clips = [np.repeat(clip[:1], num_frames, 0) if self.slow else clip for clip in clips]
        return SimpleNamespace(frames=np.stack(clips) / 255)


def test_true_clips_are_judged_right_and_stills_lower() -> None:
    scenes = evaluation_scenes(4)
    stock = tiny.Variant("stock", None)
    moving = tiny.measure(tiny.sample(Drawing(), scenes, SIZE, stock, 3, 7), scenes, 8)
    still = tiny.measure(tiny.sample(Drawing(slow=True), scenes, SIZE, stock, 3, 7), scenes, 8)
    assert set(moving) == set(tiny.MEASURES)
    assert moving["accuracy"].mean() == 1.0
    assert still["dynamic_degree"].mean() < moving["dynamic_degree"].mean()
    assert still["motion_amount"].mean() < moving["motion_amount"].mean()
    rows = tiny.rows_of({"stock": moving, "slow": still}, {"stock": 1.0, "slow": 1.0})
    assert rows[0]["dynamic_degree_change"] == rows[0]["dynamic_degree_high"] == 0
    assert "claim fails: dynamic_degree fell" in tiny.verdict(rows[1])


def test_every_variant_gets_the_same_noise() -> None:
    scenes, pipe = evaluation_scenes(5), Drawing()
    tiny.sample(pipe, scenes, SIZE, tiny.Variant("stock", None), 2, 40)
    assert pipe.seeds == [40, 41, 42, 43, 44]


@pytest.mark.parametrize(
    ("dynamic", "steady", "words"),
    [(1.0, 0.0, "claim holds"), (1.0, -1.0, "claim fails: consistency fell"), (0.0, 0.0, "not decided")],
)
def test_verdicts(dynamic: float, steady: float, words: str) -> None:
    rng = np.random.default_rng(0)
    stock = {name: rng.normal(size=40) for name in tiny.MEASURES}
    changed = dict(stock)
    changed["dynamic_degree"] = stock["dynamic_degree"] + dynamic + rng.normal(size=40) * 0.1
    if dynamic == 0:
        changed["dynamic_degree"] = stock["dynamic_degree"] + np.resize([0.3, -0.3], 40)
    changed["consistency"] = stock["consistency"] + steady
    row = tiny.rows_of({"stock": stock, "both": changed}, {"stock": 1.0, "both": 1.0})[1]
    assert words in tiny.verdict(row)


def test_bootstrap_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = tiny.bootstrap(values)
    assert low < 3.0 < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    with pytest.raises(GenAttnError, match="at least 2 clips, got 1"):
        tiny.bootstrap(values[:1])


def test_variants_are_the_two_halves_and_both() -> None:
    plugins = {kind.name: kind.plugin() if kind.plugin else None for kind in tiny.variants(0.4, 2.0, stop=0.3)}
    edits = {name: (p.edit.alpha, p.edit.beta, p.edit.keep_energy) for name, p in plugins.items() if p}
    assert edits == {"self-guidance": (0.4, 1.0, False), "enhancement": (0.0, 2.0, True), "both": (0.4, 2.0, True)}
    assert plugins["stock"] is None
    with pytest.raises(GenAttnError, match="the first variant must be stock"):
        tiny.study(None, SIZE, [tiny.Variant("both", BroadWay)], [])


def test_a_whole_study_on_a_random_pipeline(tmp_path: Path) -> None:
    pipe, _ = build_pipeline("wan")
    pipe.save_pretrained(tmp_path / "wan")
    size = {"height": 64, "width": 48, "frames": 9, "steps": 2, "guidance_scale": 3.0, "fps": 8}
    (tmp_path / "wan" / "genattn_defaults.json").write_text(json.dumps(size))
    table = tmp_path / "broadway.csv"
    tiny.main(["--model", str(tmp_path / "wan"), "--count", "2", "--batch", "2", "--stop", "0.9", "--table", str(table)])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["stock", "self-guidance", "enhancement", "both"]
    assert float(rows[3]["smoothness"]) != float(rows[0]["smoothness"])
    assert {"commit", "device", "alpha", "stop"} <= set(rows[0])


def test_kept_measures_are_not_made_again(tmp_path: Path) -> None:
    scenes, pipe = evaluation_scenes(3), Drawing()
    kinds = [tiny.Variant("stock", None)]
    first = tiny.study(pipe, SIZE, kinds, scenes, 2, 5, keep=tmp_path)
    assert pipe.seeds == [5, 6, 7]
    assert tiny.study(pipe, SIZE, kinds, scenes, 2, 5, keep=tmp_path) == first
    assert pipe.seeds == [5, 6, 7]
    tiny.study(pipe, SIZE, kinds, scenes, 2, 6, keep=tmp_path)  # other noise is another measurement
    assert pipe.seeds == [5, 6, 7, 6, 7, 8]


def test_card_needs_the_stock_row(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="a card needs the row of stock"):
        write_motion_card(tmp_path, tmp_path, [{"variant": "both"}])


def test_pooled_error_on_a_random_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, _ = build_pipeline("wan")
    pipe.save_pretrained(tmp_path / "wan")
    size = {"height": 64, "width": 48, "frames": 9, "steps": 1, "guidance_scale": 3.0, "fps": 8}
    (tmp_path / "wan" / "genattn_defaults.json").write_text(json.dumps(size))
    tiny.main(["--model", str(tmp_path / "wan"), "--count", "2", "--pooled-error"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["pool"] for row in rows] == [1, 2, 4, 99]
    assert rows[0]["error"] < 1e-3
    assert rows[1]["error"] > rows[0]["error"]
    assert rows[0]["calls"] == 4  # two guided blocks, two passes


def test_folders_without_defaults_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match=r"with genattn_defaults\.json"):
        tiny.load(tmp_path)


def test_captions_are_held_out() -> None:
    scenes = evaluation_scenes(6)
    assert len({caption(scene) for scene in scenes}) == 6
