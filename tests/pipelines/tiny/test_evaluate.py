import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import card as tiny_card, evaluate as tiny_evaluate
from genattn.pipelines.tiny.export import GenerationDefaults
from genattn.pipelines.tiny.world import caption, parse_caption, render, sample_scene


class DrawingPipeline:
    """Stands for a perfect model: draws what the caption says, with the pipeline's signature."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []
        torch.manual_seed(0)
        self.transformer = torch.nn.Linear(2, 2)

    def __call__(self, prompt, height, width, num_frames, generator, **settings):
        assert len(generator) == len(prompt)
        self.calls.append((prompt, [g.initial_seed() for g in generator], settings))
        clips = [render(parse_caption(text), num_frames, height, width) for text in prompt]
        return SimpleNamespace(frames=np.stack(clips).astype(np.float32) / 255)


def test_no_evaluated_caption_was_trained_on():
    scenes = tiny_evaluate.evaluation_scenes(80)
    for share in (0.15, 0.5):  # what the shipped models were shown, first and last
        trained = {caption(sample_scene(seed, two_objects=share)) for seed in range(tiny_evaluate.TRAINING_SCENES)}
        assert not trained & {caption(scene) for scene in scenes}
    unseen = [tiny_evaluate.is_unseen(scene) for scene in scenes]
    assert sum(unseen) == 40
    assert sum(len(scene.objects) == 2 for scene in scenes) == 11
    assert scenes == tiny_evaluate.evaluation_scenes(80)
    assert scenes != tiny_evaluate.evaluation_scenes(80, first_seed=5)


def test_a_perfect_model_scores_one(tmp_path):
    pipeline = DrawingPipeline()
    scenes = tiny_evaluate.evaluation_scenes(12)
    sampling = tiny_evaluate.Sampling(steps=7, guidance_scale=2.5, seed=40, batch=5)
    rows = tiny_evaluate.evaluate(pipeline, scenes, sampling, GenerationDefaults(frames=15))
    assert [row["split"] for row in rows] == ["all", "seen", "unseen"]
    assert [row["clips"] for row in rows] == [12, 6, 6]
    for name in ("colour", "shape", "motion", "background", "count"):
        assert rows[0][name] == 1.0
        assert rows[0][f"{name}_low"] < 0.9
    assert [len(prompts) for prompts, _, _ in pipeline.calls] == [5, 5, 2]
    assert pipeline.calls[1][1] == [45, 46, 47, 48, 49]
    assert pipeline.calls[0][2]["num_inference_steps"] == 7
    path = tmp_path / "bench" / "quality.csv"
    tiny_evaluate.append_rows(path, rows)
    tiny_evaluate.append_rows(path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 6
    assert {"device", "torch", "diffusers", "commit", "date", "seed", "steps"} <= set(read[0])
    assert read[0]["steps"] == "7"


class Stopping(DrawingPipeline):
    """Stopped by hand in its third call."""

    def __call__(self, *arguments, **settings):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().__call__(*arguments, **settings)


def test_a_stopped_evaluation_goes_on_and_ends_as_one_that_was_not(tmp_path):
    scenes = tiny_evaluate.evaluation_scenes(8)
    sampling, size, keep = tiny_evaluate.Sampling(batch=3), GenerationDefaults(frames=15), tmp_path / "new" / "verdicts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tiny_evaluate.evaluate(Stopping(), scenes, sampling, size, keep)
    assert len(keep.read_text().splitlines()) == 6
    again = DrawingPipeline()
    rows = tiny_evaluate.evaluate(again, scenes, sampling, size, keep)
    assert [(prompts, seeds) for prompts, seeds, _ in again.calls] == [([caption(s) for s in scenes[6:]], [6, 7])]
    whole = tiny_evaluate.evaluate(DrawingPipeline(), scenes, sampling, size)
    drop = lambda row: {name: value for name, value in row.items() if name != "seconds_per_clip"}  # noqa: E731
    assert [drop(row) for row in rows] == [drop(row) for row in whole]
    assert tiny_evaluate.evaluate(Stopping(), scenes[:4], sampling, size, keep)[0]["clips"] == 4


def test_verdicts_of_another_model_or_other_settings_are_refused(tmp_path):
    scenes, size, keep = tiny_evaluate.evaluation_scenes(4), GenerationDefaults(frames=15), tmp_path / "verdicts.jsonl"
    sampling = tiny_evaluate.Sampling(batch=2)
    tiny_evaluate.evaluate(DrawingPipeline(), scenes, sampling, size, keep)
    other = DrawingPipeline()
    torch.nn.init.zeros_(other.transformer.weight)
    for pipeline, asked, how in (
        (other, scenes, sampling),
        (DrawingPipeline(), scenes[::-1], sampling),
        (DrawingPipeline(), scenes, tiny_evaluate.Sampling(steps=3, batch=2)),
    ):
        with pytest.raises(GenAttnError, match="must be of this model, sampling and captions"):
            tiny_evaluate.evaluate(pipeline, asked, how, size, keep)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_the_interval_is_wilsons(right, total, low, high):
    assert tiny_evaluate.wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_a_journal_adds_up_and_tells_of_interrupted_calls(tmp_path):
    with tiny_card.journal(tmp_path, "vae", "CPU x") as done:
        done["steps"] = 5
    with pytest.raises(KeyboardInterrupt), tiny_card.journal(tmp_path, "vae", "CPU x"):
        raise KeyboardInterrupt
    with tiny_card.journal(tmp_path, "transformer", "CPU x") as done:
        done["steps"] = 9
    lines = [json.loads(line) for line in (tmp_path / tiny_card.JOURNAL).read_text().splitlines()]
    assert len(lines) == 3
    entries = tiny_card.read_journal(tmp_path)
    assert [(entry["phase"], entry["steps"]) for entry in entries] == [("vae", 5), ("transformer", 9)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp_path: tiny_evaluate.evaluation_scenes(1), "count must be >= 2"),
        (lambda tmp_path: tiny_evaluate.wilson(3, 2), "right must be in"),
        (lambda tmp_path: tiny_evaluate.Sampling(steps=0), "steps, batch and length must be >= 1"),
        (lambda tmp_path: tiny_card.read_journal(tmp_path), "must have a journal"),
    ],
)
def test_bad_input_is_refused(call, message, tmp_path):
    with pytest.raises(GenAttnError, match=message):
        call(tmp_path)


def test_a_table_with_other_columns_is_not_spoilt(tmp_path):
    path = tmp_path / "quality.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(GenAttnError, match="must have the columns"):
        tiny_evaluate.append_rows(path, [{"a": 1, "c": 2}])
    assert path.read_text() == "a,b\n1,2\n"
