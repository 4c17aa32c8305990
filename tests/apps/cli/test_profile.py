"""`genattn profile` from the command line to a map that `generate` takes."""

import json
import sys
from pathlib import Path

import pytest

from genattn.apps.cli import root as cli
from genattn.apps.sampling.attention_names import pattern_from_name
from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.patterns.published import sol
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.planning.ladder import ADAPTIVE
from genattn.selection.estimate import PooledScore
from genattn.selection.rules import ErrorAware, TopK, TopP
from genattn.selection.tiling import Boxes

SIZE = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe, _ = build_pipeline("wan")
    pipe.save_pretrained(folder)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["genattn", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_map_from_prompts_to_a_clip(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    out = tmp_path / "maps" / "map.safetensors"
    words = ["profile", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--target-density", "0.4", *SIZE]
    words += ["--out", str(out), "--picture", str(tmp_path / "map.png")]
    assert call(monkeypatch, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["density"] == pytest.approx(0.4, abs=0.02)
    assert told["prompts"] == 2
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert call(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "40.0% of the scores" in said
    assert f"use it: genattn generate --model {model} --attention {out} --prompt ..." in said
    clip = tmp_path / "clip.mp4"
    words = ["generate", "--model", str(model), "--prompt", "a cat", "--attention", str(out), *SIZE, "--out", str(clip)]
    assert call(monkeypatch, *words, "--dense-steps", "0", "--dense-layers", "0", "--json") == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["density"] == pytest.approx(0.4, abs=0.08)  # three cells: a head takes a third, two thirds or all


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("a cat\n", [], "needs at least 2 different prompts"),
        ("a cat\na dog\n", ["--target-density", "2"], "target_density must be in"),
        ("a cat\na dog\n", ["--out", "map.bin"], ".safetensors"),
    ],
)
def test_refusals_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    text: str,
    more: list[str],
    says: str,
) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    words = ["profile", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), *SIZE]
    assert call(monkeypatch, *words, "--out", str(tmp_path / "map.safetensors"), *more) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1]


def test_names_of_content_patterns() -> None:
    assert pattern_from_name("sol", "tau=1.3") == sol(1.3)
    found = pattern_from_name("adaptive", "rule=top-p,mass=0.8,levels=1,tail=null")
    assert isinstance(found, AdaptivePattern)
    assert found.selection == TopP(0.8)
    assert found.score == PooledScore(1)
    inside = pattern_from_name("adaptive", '{"inside": {"type": "RadialPattern", "decay": 0.3}, "share": 0.4}')
    assert isinstance(inside, AdaptivePattern)
    assert inside.inside == RadialPattern(decay=0.3)
    assert inside.selection == TopK(0.4)
    assert inside.tiles == Boxes()
    assert pattern_from_name("adaptive") == ADAPTIVE
    assert pattern_from_name("adaptive", "rule=error-aware,tiles=boxes") == AdaptivePattern(
        ErrorAware(), PooledScore(0), tail="mean2"
    )
    assert ADAPTIVE.tail == ADAPTIVE.measured_tail, "the preset stands in for what it skips as all patterns do"


def test_names_of_maps() -> None:
    shipped = Path(__file__).resolve().parents[3] / "assets" / "maps" / "tiny-wan.safetensors"
    by_option = json.dumps({"path": str(shipped), "density": 0.4})
    for name, options in ((str(shipped), "density=0.4"), (f"profile:{shipped}", "density=0.4"), ("profile", by_option)):
        found = pattern_from_name(name, options)
        assert isinstance(found, ProfiledPattern)
        assert found == ProfiledPattern(str(shipped), density=0.4), "the same map, and the same tail, as from Python"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("adaptive", "rule=best", "rule must be one of top-k, top-p"),
        ("adaptive", "rule=top-p,share=0.3", "the rule has the amount 'mass', got share"),
        ("adaptive", "shares=0.3", "adaptive has no setting 'shares'"),
        ("svg2", "clusters=3", "settings of svg2"),
        ("none.safetensors", None, "there is no 'none.safetensors'"),
        ("profile:none.safetensors", None, "there is no 'none.safetensors'"),
        ("profile", None, "--attention profile needs the file of a map"),
        ("profile", "layer=3", "a map has no setting 'layer'"),
    ],
)
def test_names_that_are_refused(name: str, options: str | None, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        pattern_from_name(name, options)


def test_a_map_has_no_window() -> None:
    with pytest.raises(GenAttnError, match="--window and --stride belong to neighborhood, got the map a.safetensors"):
        pattern_from_name("a.safetensors", window="3x3")
