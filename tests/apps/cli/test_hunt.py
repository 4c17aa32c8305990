"""`genattn hunt` from the command line to a head set."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from genattn.apps.cli import root as cli
from genattn.apps.cli.hunt import _understood
from genattn.apps.sampling.run import SamplingSettings
from genattn.guidance.heads.head_set import HeadSet
from genattn.pipelines.tiny.random.build import build_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe, _ = build_pipeline("sd3")
    pipe.save_pretrained(folder)
    return folder


def hunt(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, *more: str) -> int:
    (folder / "prompts.txt").write_text("a cat\n\na dog\n")
    call = json.dumps({"height": 16, "width": 12, "max_sequence_length": 16})
    words = ["hunt", "--model", str(model), "--prompts", str(folder / "prompts.txt"), "--held-out", str(folder / "prompts.txt")]
    words += ["--log", str(folder / "log.jsonl"), "--out", str(folder / "sets" / "heads.json"), "--device", "cpu"]
    words += ["--objective", "contrast", "--heads", "L1H0-2", "--steps", "2", "--call", call, "--top-k", "1", *more]
    monkeypatch.setattr(sys, "argv", ["genattn", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_hunts_and_writes_a_head_set(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert hunt(monkeypatch, model, tmp_path, "--objective", "unclipped=0.5", "--floor", "unclipped=-1") == 0
    told = capsys.readouterr()
    found = HeadSet.load(tmp_path / "sets" / "heads.json")
    assert len(found.heads) == 1
    assert found.objective == "1 contrast + 0.5 unclipped"
    assert "held out, gain over unguided: contrast" in told.out
    assert hunt(monkeypatch, model, tmp_path, "--objective", "unclipped=0.5", "--floor", "unclipped=-1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found.to_dict()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--objective", "sharpnes"), "objective must be one of"),
        (("--objective", "sharpness=much"), "must be NAME=NUMBER"),
        (("--floor", "contrast"), "must be NAME=NUMBER"),
        (("--call", "[1]"), "must be a JSON object"),
        (("--call", "{"), "must be a JSON object"),
        (("--call", '{"heigth": 16}'), "--call names heigth, and StableDiffusion3Pipeline takes no such argument"),
        (("--heads", "L9"), "it has L0-2"),
        (("--scale", "nan"), "scale must be a finite number"),
    ],
)
def test_refuses(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    more: tuple[str, ...],
    message: str,
) -> None:
    assert hunt(monkeypatch, model, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_the_picture_to_start_from_reaches_the_call(tmp_path: Path) -> None:
    class Starts:
        config: ClassVar[dict[str, Any]] = {}

        def __call__(self, prompt: str, image: Any, num_inference_steps: int = 3) -> None: ...

    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    call = _understood(Starts(), SamplingSettings(steps=2, image=tmp_path / "a.png", height=16))
    assert call.pop("image").getpixel((0, 0)) == (255, 0, 0)
    assert call == {"num_inference_steps": 2}
