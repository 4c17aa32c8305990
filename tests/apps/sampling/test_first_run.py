"""Without --model: the shipped model on which sparse attention pays, with its map; what a user names stays."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from genattn.apps.cli.root import app
from genattn.apps.sampling import first_run as module, generate
from genattn.apps.sampling.first_run import FIRST_MODEL, first_run
from genattn.apps.sampling.generate import GenerateRequest
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings
from genattn.errors import GenAttnError
from genattn.patterns.profiled import ProfiledPattern
from genattn.patterns.radial import RadialPattern

NOTHING = frozenset[str]()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `genattn generate ARGUMENTS` would run."""
    found: list[GenerateRequest] = []
    monkeypatch.setattr(generate, "generate_all", lambda requests: found.extend(requests) or [])

    def run(*arguments: str) -> GenerateRequest:
        answer = CliRunner().invoke(app, ["generate", "--prompt", "a cat", "--out", str(tmp_path / "a.mp4"), *arguments])
        assert answer.exception is None, answer.exception
        return found[-1]

    return run


def test_a_first_run_takes_the_long_model_and_its_map(asked) -> None:
    request = asked()
    assert Path(request.settings.model).name == FIRST_MODEL
    assert isinstance(request.attention.pattern, ProfiledPattern)
    assert Path(request.attention.pattern.path).name == f"{FIRST_MODEL}.safetensors"
    assert (request.attention.dense_steps, request.attention.dense_layers) == (0, 0)
    assert request.attention.pattern.tail == "mean2"


def test_what_is_named_stays(asked) -> None:
    request = asked("--attention", "radial")
    assert Path(request.settings.model).name == FIRST_MODEL
    assert request.attention.pattern == RadialPattern()
    assert (request.attention.dense_steps, request.attention.dense_layers) == (0.25, 1)
    request = asked("--dense-steps", "2")
    assert isinstance(request.attention.pattern, ProfiledPattern)
    assert (request.attention.dense_steps, request.attention.dense_layers) == (2, 0)
    request = asked("--pattern-options", "decay=0.3")
    assert request.attention.pattern == RadialPattern(decay=0.3)


@pytest.mark.parametrize(("named", "wanted"), [((), FIRST_MODEL), (("--model", "mine"), "mine")])
def test_profile_measures_the_model_that_generate_takes(
    named: tuple[str, ...], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    opened: list[SamplingSettings] = []

    def stop(settings: SamplingSettings) -> None:
        opened.append(settings)
        raise GenAttnError("far enough")

    monkeypatch.setattr("genattn.apps.sampling.run.open_pipeline", stop)
    words = ["profile", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "map.safetensors"), *named]
    CliRunner().invoke(app, words)
    assert [Path(str(settings.model)).name for settings in opened] == [wanted]


def test_a_named_model_gets_its_own_preset_or_what_is_named(asked) -> None:
    request = asked("--model", str(shipped_model()))
    assert request.settings.model == str(shipped_model())
    assert (request.attention.pattern, request.attention.schedule) == ("auto", {})
    request = asked("--model", str(shipped_model()), "--dense-steps", "2", "--attention", "auto")
    assert request.attention.schedule == {"dense_steps": 2}
    request = asked("--model", str(shipped_model()), "--attention", "radial")
    assert request.attention.pattern == RadialPattern()
    assert request.attention.schedule == {"dense_steps": 0.25, "dense_layers": 1}


def test_without_the_long_model_or_its_map_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings, attention = SamplingSettings(), AttentionSettings("radial", RadialPattern(), given=NOTHING)

    def missing(name: str = "tiny-wan") -> Path:
        raise GenAttnError("this installation has no shipped model")

    monkeypatch.setattr(module, "shipped_model", missing)
    assert first_run(settings, attention) == (settings, attention)
    monkeypatch.setattr(module, "shipped_model", lambda name: tmp_path / name)
    found, same = first_run(settings, attention)
    assert (found.model, same) == (str(tmp_path / FIRST_MODEL), attention)
