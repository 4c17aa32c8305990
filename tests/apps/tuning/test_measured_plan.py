"""plan --auto: measured on a pipeline, written as settings that generate reads back."""

import json
from pathlib import Path

import pytest

from genattn.apps.cli.patterns import plan_command
from genattn.apps.sampling.run import SamplingSettings
from genattn.apps.tuning.measured_plan import measured_plan
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.seam.settings_file import load_sparse

SIZE = {"frames": 17, "height": 128, "width": 128, "steps": 2}


@pytest.fixture
def settings(random_wan_folder: Path) -> SamplingSettings:
    return SamplingSettings(model=str(random_wan_folder), guidance_scale=1.0, **SIZE)


def test_chosen_settings_round_trip(settings: SamplingSettings, tmp_path: Path) -> None:
    plan = measured_plan(settings, "a cat", target_density=0.6, out=tmp_path / "s.json")
    assert plan.psnr is None
    assert plan.measurement.calls > 0
    assert load_sparse(tmp_path / "s.json").pattern == plan.pattern


def test_a_psnr_is_kept(settings: SamplingSettings) -> None:
    plan = measured_plan(settings, "a cat", min_psnr=10.0)
    assert plan.psnr is not None
    assert plan.psnr >= 10.0
    assert plan.density < 1


def test_the_command(random_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    plan_command(str(random_wan_folder), "128x128", 17, target_density=0.6, steps=4, auto=True, out=out, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["target_density"] == 0.6
    assert out.is_file()


def test_refusals(random_wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match=r"--out must end in \.json"):
        plan_command(str(random_wan_folder), auto=True, out=tmp_path / "s.txt")
    pictures, _ = build_pipeline("sd3")
    pictures.save_pretrained(tmp_path / "sd3")
    with pytest.raises(GenAttnError, match="plan --auto needs a video pipeline, got StableDiffusion3Pipeline"):
        measured_plan(SamplingSettings(model=str(tmp_path / "sd3")), "a cat")
    with pytest.raises(GenAttnError, match="target_density must be between"):
        measured_plan(SamplingSettings(model=str(random_wan_folder), **SIZE), "a cat", target_density=0.001)
