"""Names on the seam: the report tells the preset, the notice comes once, and short sequences stay dense under "auto"."""

import logging
from pathlib import Path

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_model, build_pipeline
from genattn.planning.fitted import FittedNeighborhood
from genattn.seam import named
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

WIDE = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_SAID", set())


@pytest.mark.parametrize(
    ("name", "kind"), [("radial", RadialPattern), ("gna", FittedNeighborhood), ("adaptive", AdaptivePattern)]
)
def test_a_name_runs_sparse_and_is_told(name: str, kind: type, caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = build_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, "genattn"), genattn.apply(pipe, name, dense_steps=0, dense_layers=0) as handle:
        pipe(**{**call, **WIDE})
        report = handle.report()
    plugin = handle.plugins[0]
    assert isinstance(plugin, SparsePlugin)
    assert isinstance(plugin.pattern, kind)
    assert report.sparse_calls == report.calls > 0
    assert report.plugins[0]["preset"].startswith(f"'{name}': no preset is known for WanTransformer3DModel with 3 layers")
    assert report.plugins[0]["preset"] in report.table()
    told = [r for r in caplog.records if "no preset is known" in r.getMessage()]
    assert len(told) == 1
    genattn.apply(pipe, name).remove()
    assert len([r for r in caplog.records if "no preset is known" in r.getMessage()]) == 1


def test_auto_keeps_short_sequences_dense_bit_for_bit() -> None:
    pipe, call = build_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    call = {**call, **WIDE, "num_frames": 5}

    def run() -> torch.Tensor:
        frames: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        return frames

    call.pop("generator", None)
    stock = run()
    with genattn.apply(pipe, "auto", dense_steps=0, dense_layers=0) as handle:
        assert torch.equal(run(), stock)
        report = handle.report()
    least = handle.plugins[0].schedule.min_tokens  # type: ignore[attr-defined]
    assert least > 128
    assert report.sparse_calls == 0
    assert report.dense_reasons == {f"short sequence (min_tokens={least})": report.calls}
    with genattn.apply(pipe, "auto", dense_steps=0, dense_layers=0, min_tokens=0) as handle:
        run()
        assert handle.report().sparse_calls == handle.report().calls


def test_settings_win_over_the_presets_and_a_schedule_keeps_the_break_even() -> None:
    pipe, _ = build_pipeline("wan")
    plugin = genattn.apply(pipe, "auto", dense_layers=3).plugins[0]
    assert plugin.schedule.dense_layers == 3  # type: ignore[attr-defined]
    genattn.remove(pipe)
    given = Schedule(dense_steps=2)
    other = genattn.apply(pipe, "auto", schedule=given).plugins[0]
    assert other.schedule.dense_steps == 2  # type: ignore[attr-defined]
    assert other.schedule.min_tokens == plugin.schedule.min_tokens > 0  # type: ignore[attr-defined]
    genattn.remove(pipe)
    mine = genattn.apply(pipe, "auto", schedule=Schedule(min_tokens=7)).plugins[0]
    assert mine.schedule.min_tokens == 7  # type: ignore[attr-defined]


def test_a_bare_model_and_refusals(tmp_path: Path) -> None:
    model = build_model("wan")
    genattn.apply(model, "radial").remove()
    with pytest.raises(
        GenAttnError, match="must be one of radial, gna, adaptive, .*, auto, got 'radail'; did you mean 'radial'"
    ):
        genattn.apply(model, "radail")
    with pytest.raises(GenAttnError, match=r"plugins must be objects, got the class RadialPattern; write RadialPattern\(...\)"):
        genattn.apply(model, RadialPattern)  # type: ignore[arg-type]
    for plugin in ("radial", RadialPattern()):
        with pytest.raises(GenAttnError, match="impl must be one of auto, triton, .*, halo, natten, got 'fooo'"):
            genattn.apply(model, plugin, impl="fooo")
    with pytest.raises(GenAttnError, match="there is no"):
        genattn.apply(model, f"profile:{tmp_path / 'no.safetensors'}")
    with pytest.raises(GenAttnError, match="has no self or joint attention for a pattern"):
        genattn.apply(torch.nn.Linear(2, 2), "auto")


def test_the_command_lines_name_for_windows_and_a_bare_file_of_settings(tmp_path: Path) -> None:
    model = build_model("wan")
    windows = genattn.apply(model, "neighborhood").plugins[0]
    assert isinstance(windows.pattern, FittedNeighborhood)  # type: ignore[attr-defined]
    genattn.remove(model)
    with pytest.raises(GenAttnError, match=r"none\.json"):
        genattn.apply(model, str(tmp_path / "none.json"))


def test_backends() -> None:
    assert named.backend_of("cuda", "auto") == "triton"
    assert named.backend_of("cpu", "auto") in ("cpu", "grouped")
    assert named.backend_of("cpu", "grouped") == "grouped"
