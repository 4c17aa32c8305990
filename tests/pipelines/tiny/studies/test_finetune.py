"""The fine-tuning study: what it writes for training, how it judges, what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.cache import ClipSize
from genattn.pipelines.finetune.data import find_clips, read_clip
from genattn.pipelines.tiny.studies.finetune import ARMS, StudySettings, main, measured, write_clips
from genattn.pipelines.tiny.world import caption, parse_caption, render, sample_scene


def test_training_clips_are_captioned_and_written_once(tmp_path: Path) -> None:
    size = ClipSize(9, 32, 32)
    write_clips(tmp_path, size, 2, 16.0)
    found = find_clips(tmp_path)
    assert [parse_caption(clip.caption) is not None for clip in found.clips] == [True, True]
    frames = read_clip(found.clips[0], 9, 32, 32)
    assert np.abs(frames.astype(int) - render(sample_scene(0, two_objects=0.0), 9, 32, 32)).mean() < 6
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.mp4"))]
    write_clips(tmp_path, size, 2, 16.0)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.mp4"))] == before


def test_true_clips_score_full_marks_and_empty_ones_none() -> None:
    scenes = [sample_scene(seed, two_objects=0.0) for seed in range(4)]
    clips = np.stack([render(scene, 29, 64, 64) for scene in scenes])
    row = measured(clips, scenes)
    assert row["clips"] == 4
    assert row["accuracy"] > 0.9
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert measured(np.zeros_like(clips), scenes)["accuracy"] == 0
    assert {caption(scene) for scene in scenes}


def test_refusals(tmp_path: Path) -> None:
    assert [ARMS[name] is None for name in ARMS] == [True, True, False]
    with pytest.raises(GenAttnError, match="count >= 2"):
        StudySettings(count=1)
    with pytest.raises(GenAttnError, match="must be a tiny pipeline's folder"):
        main(["--model", str(tmp_path), "--run-dir", str(tmp_path)])
