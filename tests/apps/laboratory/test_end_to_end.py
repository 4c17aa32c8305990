"""The laboratory of whole calls: what is timed, that a run goes on, and that rows are paired with dense."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from genattn.apps.laboratory import end_to_end
from genattn.apps.laboratory.adaptive import read_samples
from genattn.apps.laboratory.end_to_end import Stopwatch, clock_one, run_samples, settings_by_name, summary
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.run import DENSE, AttentionSettings
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.long_clip.riflex import FrameStretch

MAP = shipped_model().parent / "maps" / "tiny-wan.safetensors"


def _sample(caption: int, setting: str, oracle: float, speed: float, frames: int = 61) -> dict[str, Any]:
    return {
        **{
            "frames": frames,
            "caption": caption,
            "setting": setting,
            "density": 0.25,
            "psnr": None if setting == "dense" else 30.0 + caption,
        },
        **{"ssim": 0.9, "colour": oracle, "shape": oracle, "motion": oracle, "size": oracle},
        **{"speedup_processor": speed, "speedup_denoiser_processor": 2 * speed},
    }


def test_rows_are_paired_with_dense_by_caption() -> None:
    samples = [_sample(n, "dense", float(n % 2), 1.0) for n in range(4)]
    samples += [_sample(n, "window", 0.5, 2.0) for n in (1, 3)]
    told = {"seconds": 3.0, "denoiser_seconds": 2.0, "peak_gb": 0.5, "threads": 2, "speedup": 3.0, "denoiser_speedup": 4.0}
    clocked = [{"frames": 61, "setting": "window"} | told, {"frames": 125, "setting": "dense"} | told]
    rows = {row["setting"]: row for row in summary(samples, clocked)}
    assert rows["dense"]["oracle_change"] == 0
    assert "seconds" not in rows["dense"], "the clock was read at another length"
    assert "psnr" not in rows["dense"]
    # captions 1 and 3 have 1.0 dense: the change is -0.5 in each, whatever dense has on the others
    assert rows["window"]["oracle_change"] == rows["window"]["oracle_change_high"] == -0.5
    assert rows["window"]["psnr"] == 32
    assert rows["window"]["captions"] == 2
    assert (rows["window"]["speedup"], rows["window"]["speedup_denoiser"]) == (3.0, 4.0)
    assert rows["window"]["speedup_processor"] == 2.0
    assert rows["window"]["peak_gb"] == 0.5


def test_lengths_are_rows_of_their_own() -> None:
    samples = [_sample(0, "dense", 1.0, 1.0), _sample(0, "dense", 0.0, 1.0, 125), _sample(0, "window", 0.5, 2.0, 125)]
    rows = {(row["frames"], row["setting"]): row for row in summary(samples, [])}
    assert list(rows) == [(61, "dense"), (125, "dense"), (125, "window")]
    assert rows[125, "window"]["oracle_change"] == 0.5
    assert (rows[61, "dense"]["tokens"], rows[125, "window"]["tokens"]) == (4096, 8192)


def test_frames_beyond_the_trained_ones_are_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    put_on: list[FrameStretch] = []
    monkeypatch.setattr(end_to_end.genattn, "apply", lambda pipe, plugin: put_on.append(plugin))
    assert end_to_end.opened("tiny-wan", 61)[1]["num_frames"] == 61
    assert not put_on
    assert end_to_end.opened("tiny-wan", 125)[1]["num_frames"] == 125
    assert [plugin.trained_frames for plugin in put_on] == [16]


def test_the_window_holds_a_quarter_of_any_clip() -> None:
    for frames, size in ((61, 4), (125, 8)):
        pattern = settings_by_name(MAP, frames)["window"].pattern
        assert isinstance(pattern, NeighborhoodPattern)
        assert pattern.window_size == (size, 16, 16)
    with pytest.raises(end_to_end.GenAttnError, match=r"frames must be 1 \+ 4 n and at least 13, got 60; the nearest is 61"):
        settings_by_name(MAP, 60)


def test_the_settings_are_sparse_in_every_step_unless_named() -> None:
    found = settings_by_name(MAP)
    assert found["dense"] is DENSE
    assert all(s.pattern is not None and s.dense_layers == 0 for name, s in found.items() if name != "dense")
    assert {name for name, s in found.items() if s.dense_steps} == {"dense", "profiled 0.4 + mean2, 2 dense steps"}
    assert {name.split("+ ")[1].split(",")[0] for name in found if "+" in name} == {"mean", "mean2"}
    assert all(s.pattern.tail == name.split("+ ")[1].split(",")[0] for name, s in found.items() if "+" in name and s.pattern)
    assert found["window"].pattern is not None
    assert found["window"].pattern.tail is None


def test_a_stopwatch_counts_one_module_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"clock": 0.0, "processor": 0.0}
    clocks = SimpleNamespace(perf_counter=lambda: now["clock"], process_time=lambda: now["processor"])
    monkeypatch.setattr(end_to_end, "time", clocks)

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now["clock"] += 3.0
            now["processor"] += 1.0
            return x

    module = Slow()
    watch = Stopwatch(module)
    for _ in range(2):
        module(torch.zeros(1))
    now["clock"] += 10.0  # outside
    assert (watch.clock, watch.processor) == (6.0, 2.0)
    watch.stop()
    module(torch.zeros(1))
    assert (watch.clock, watch.processor) == (6.0, 2.0)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_run_goes_on_and_the_dense_clip_is_the_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = AttentionSettings("window", NeighborhoodPattern((2, 8, 8)).with_tail(None), 0, 0)
    monkeypatch.setattr(end_to_end, "settings_by_name", lambda profile, frames: {"dense": DENSE, "window": window})
    opened = end_to_end.opened
    monkeypatch.setattr(
        end_to_end, "opened", lambda *given: (opened(*given)[0], opened(*given)[1] | {"num_inference_steps": 2})
    )
    out = tmp_path / "samples.jsonl"
    run_samples("tiny-wan", 1, ["dense"], MAP, out, 13)
    run_samples("tiny-wan", 1, ["dense", "window"], MAP, out, 13)
    dense, sparse = read_samples(out)
    assert (dense["setting"], sparse["setting"]) == ("dense", "window")
    assert dense["psnr"] is None
    assert dense["ssim"] == 1.0
    assert dense["density"] == 1.0
    assert 5 < sparse["psnr"] < 60
    assert 0.2 < sparse["density"] < 0.6
    for sample in (dense, sparse):
        assert 0 < sample["denoiser_seconds"] < sample["seconds"]
    once = _clocked_with(monkeypatch, {"dense": [9.0, 5.0, 8.0, 6.0], "window": [7.0, 2.0, 2.0, 3.0]})
    # the first call of each does not count; ratios 5 / 2, 8 / 2, 6 / 3 of neighbours
    assert (once["seconds"], once["speedup"]) == (2.0, 2.5)
    assert (once["denoiser_seconds"], once["denoiser_speedup"]) == (1.0, 2.5)
    assert once["setting"] == "window"
    assert 0.05 < once["peak_gb"] < 20
    assert once["density"] == sparse["density"]


def _clocked_with(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """`clock_one` where the calls of each setting take so long, one after the other."""
    timed, left = end_to_end.timed_run, {name: iter(some) for name, some in seconds.items()}

    def run(*given: Any) -> Any:
        result, clock = timed(*given)
        name = "dense" if given[-1] is DENSE else given[-1].name
        took = next(left[name])
        return result, clock | {"seconds": took, "denoiser_seconds": took / 2}

    monkeypatch.setattr(end_to_end, "timed_run", run)
    return clock_one("tiny-wan", "window", MAP, 13)


def test_an_unknown_setting_is_refused_with_the_names(tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        end_to_end.app, ["run", "--setting", "windows", "--map", str(MAP), "--out", str(tmp_path / "x")]
    )
    assert answer.exit_code != 0
    with pytest.raises(end_to_end.GenAttnError, match="settings must be among dense, window.*got windows"):
        raise answer.exception  # type: ignore[misc]
