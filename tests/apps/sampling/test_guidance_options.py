"""Guidance named on the command line becomes plugins, and acts in dense and sparse runs alike."""

import os
from pathlib import Path

import numpy as np
import pytest

from genattn.apps.sampling.generate import GenerateRequest, generate, generate_all, numbered
from genattn.apps.sampling.guidance_options import GuidanceSettings
from genattn.apps.sampling.output_files import read_video
from genattn.apps.sampling.run import DENSE, AttentionSettings, SamplingSettings
from genattn.errors import GenAttnError
from genattn.guidance.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.softpag import SoftPAG
from genattn.patterns.radial import RadialPattern


def test_every_method_becomes_its_plugin() -> None:
    assert GuidanceSettings().plugins() == []
    found = GuidanceSettings("L0H1", 0.25, 2.0, "0.3", 1.5).plugins()
    assert [type(plugin) for plugin in found] == [SoftPAG, BroadWay, EnhanceAVideo]
    told = found[0].settings()
    assert (told["u"], told["scale"]) == (0.25, 2.0)
    assert found[1].settings()["alpha"] == 0.3
    assert found[2].settings()["weight"] == 1.5
    assert GuidanceSettings(broadway="animatediff").plugins()[0].settings() == BroadWay.preset("animatediff").settings()
    assert GuidanceSettings("L0", broadway="0.3").name == "softpag, broadway"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"broadway": "much"}, r"--broadway must be a strength \(0.3\) or one of .*animatediff.*, got 'much'"),
        ({"softpag": "missing.json"}, "there is no 'missing.json'"),
        ({"enhance": float("nan")}, "--enhance must be a finite number, got nan"),
        ({"broadway": "nan"}, "alpha must be in .* got nan"),
        ({"softpag": "foo"}, "heads must be written like .* got 'foo'"),
        ({"softpag": "L1", "softpag_u": 2.0}, r"u must be a number in \[0, 1\], got 2.0"),
        ({"softpag": "L1", "softpag_scale": float("inf")}, "scale must be a finite number, got inf"),
    ],
)
def test_what_is_refused_before_a_model_is_opened(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        GuidanceSettings(**settings)  # type: ignore[arg-type]


def test_guidance_acts_in_both_runs_and_is_told(random_wan_folder: Path, tmp_path: Path) -> None:
    settings = SamplingSettings(str(random_wan_folder), frames=5, height=64, width=64, steps=1, guidance_scale=1.0)
    guided = AttentionSettings("radial", RadialPattern(), 0, 0, GuidanceSettings("L0", 0.5, 8.0))
    report = generate(GenerateRequest("a cat", tmp_path / "a.mp4", guided, settings, compare_dense=True))
    assert report["guidance"] == {"softpag": "L0", "softpag_u": 0.5, "softpag_scale": 8.0}
    plain = generate(GenerateRequest("a cat", tmp_path / "b.mp4", DENSE, settings))
    assert plain["guidance"] == {}
    dense = read_video(tmp_path / "a.dense.mp4")[0]
    assert not np.array_equal(dense, read_video(tmp_path / "b.mp4")[0]), "the dense twin must be guided too"


def test_several_prompts_and_seeds_open_the_pipeline_once(
    random_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genattn.apps.sampling import generate as module

    opened = []
    stock = module.open_pipeline
    monkeypatch.setattr(module, "open_pipeline", lambda settings: opened.append(settings) or stock(settings))
    settings = SamplingSettings(str(random_wan_folder), frames=5, height=64, width=64, steps=1, guidance_scale=1.0)
    names = numbered(tmp_path / "a.mp4", 3)
    wanted = [("a cat", 0), ("a cat", 1), ("a dog", 0)]
    reports = generate_all([GenerateRequest(text, path, DENSE, settings, seed) for (text, seed), path in zip(wanted, names)])
    assert len(opened) == 1
    assert [(r["prompt"], r["seed"]) for r in reports] == wanted
    assert {name for name in os.listdir(tmp_path) if name.endswith(".mp4")} == {"a-1.mp4", "a-2.mp4", "a-3.mp4"}
    first, second = (read_video(path)[0] for path in names[:2])
    assert not np.array_equal(first, second)


def test_names_sort_as_they_were_asked_for() -> None:
    assert numbered(Path("a.mp4"), 1) == [Path("a.mp4")]
    assert [path.name for path in numbered(Path("a.mp4"), 12)] == sorted(f"a-{i:02d}.mp4" for i in range(1, 13))
