"""The laboratory of adaptive sparsity: samples go on where they were, and the table is what the samples say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import SD3Transformer2DModel, WanTransformer3DModel

from genattn.apps.laboratory import adaptive
from genattn.apps.laboratory.adaptive import SHARES, interval, read_samples, rivals, run_samples, summary
from genattn.apps.laboratory.break_even import choice_thresholds, fastest, thresholds
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.measured_rows import read_rows
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.pipelines.tiny.evaluate import fingerprint

MAP = shipped_model().parent / "maps" / "tiny-wan.safetensors"


def _sample(
    caption: int, pattern: str, tail: str | None, psnr: float, errors: list[float], weights: str = ""
) -> dict[str, object]:
    return {
        **{
            "model": "tiny-wan",
            "weights": weights,
            "caption": caption,
            "share": 0.25,
            "pattern": pattern,
            "tail": tail,
            "density": 0.25,
        },
        **{"seconds": 2.0, "dense_seconds": 3.0, "psnr": psnr, "ssim": 0.9, "oracle": 1.0, "errors": errors},
    }


def test_rows_are_paired_with_todays_radial() -> None:
    samples = [_sample(n, "radial", None, 20.0 + n, [0.04]) for n in range(4)]
    samples += [_sample(n, "top-k", "mean", 27.0 + n, [0.01, 0.03]) for n in range(3)]
    rows = {row["pattern"]: row for row in summary(samples)}
    assert rows["top-k"]["captions"] == 3
    assert rows["top-k"]["error"] == pytest.approx(math.sqrt(0.02), abs=1e-4)
    assert rows["top-k"]["psnr_gain"] == pytest.approx(7.0)
    assert rows["top-k"]["psnr_gain_low"] == rows["top-k"]["psnr_gain_high"] == pytest.approx(7.0)
    assert rows["top-k"]["psnr_low"] < rows["top-k"]["psnr"] < rows["top-k"]["psnr_high"]
    assert rows["top-k"]["speedup"] == pytest.approx(1.5)
    assert rows["radial"]["psnr_gain"] == 0
    assert interval("x", [1.0]) == {"x": 1.0, "x_low": 1.0, "x_high": 1.0}


def test_what_a_tail_gains_is_paired_with_the_same_pattern_without() -> None:
    samples = [_sample(n, "top-k", None, 20.0 + n, [0.04]) for n in range(4)]
    samples += [_sample(n, "window", None, 10.0, [0.04]) for n in range(4)]
    samples += [_sample(n, "top-k", "mean2", 23.0 + n, [0.01]) for n in (1, 3, 7)]
    rows = {(row["pattern"], row["tail"]): row for row in summary(samples)}
    assert rows["top-k", "mean2"]["tail_gain"] == rows["top-k", "mean2"]["tail_gain_high"] == pytest.approx(3.0)
    assert "tail_gain" not in rows["top-k", ""]


def test_static_rivals_are_at_the_share_they_stand_for() -> None:
    layout = TokenLayout.from_grid((8, 8, 8))
    for share in SHARES:
        found = rivals("tiny-wan", share, MAP)
        assert list(found) == ["window", "radial", "top-k", "top-p", "error-aware", "clusters", "profiled"]
        for name in ("window", "radial"):
            assert found[name].plan(layout, 16, 16).density == pytest.approx(share, abs=0.04)
        layers = [found["profiled"].for_layer(n, 5).for_step(f) for n in range(5) for f in (0.1, 0.5, 0.9)]
        density = sum(p.plan(layout, 16, 16).density for p in layers) / len(layers)
        assert density == pytest.approx(share, abs=0.02)


def test_the_long_models_windows_are_at_the_share_they_stand_for() -> None:
    layout = TokenLayout.from_grid((16, 16, 16))
    for share in SHARES:
        found = rivals("tiny-wan-long", share, MAP.with_name("tiny-wan-long.safetensors"))
        assert "radial" not in found
        assert found["window"].plan(layout, 128, 128).density == pytest.approx(share, abs=0.03)


def test_unknown_models_and_shares_are_refused() -> None:
    with pytest.raises(GenAttnError, match="model must be one of tiny-wan, tiny-wan-long, tiny-sd3, got 'wan'"):
        rivals("wan", 0.25, MAP)
    with pytest.raises(GenAttnError, match=r"share must be one of 0\.15, 0\.25, 0\.4, got 0\.3"):
        rivals("tiny-wan", 0.3, MAP)


def test_a_new_table_keeps_the_rows_that_it_does_not_speak_of(tmp_path: Path) -> None:
    table, samples = tmp_path / "table.csv", tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(_sample(0, name, None, 20.0, [])) + "\n" for name in ("radial", "top-k")))
    adaptive.table_command(samples, table)
    samples.write_text(json.dumps(_sample(0, "top-k", None, 30.0, [])) + "\n")
    adaptive.table_command(samples, table)
    assert {row["pattern"]: float(row["psnr"]) for row in read_rows(table)} == {"radial": 20.0, "top-k": 30.0}


def test_a_run_adds_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "samples.jsonl"
    one = {"window": rivals("tiny-wan", 0.25, MAP)["window"], "profiled": rivals("tiny-wan", 0.25, MAP)["profiled"]}
    monkeypatch.setattr(adaptive, "rivals", lambda model, share, profile: one)
    monkeypatch.setitem(adaptive.GROUNDS, "tiny-wan", replace(adaptive.GROUNDS["tiny-wan"], probed=1))
    weights = fingerprint(WanTransformer3DModel.from_pretrained(shipped_model("tiny-wan"), subfolder="transformer"))
    out.write_text(json.dumps(_sample(0, "window", None, 1.0, [], weights)) + "\n")
    run_samples("tiny-wan", 1, (0.25,), MAP, out)
    samples = read_samples(out)
    assert [(s["pattern"], s["tail"]) for s in samples] == [
        ("window", None),
        ("window", "mean"),
        ("window", "mean2"),
        ("profiled", None),
        ("profiled", "mean"),
        ("profiled", "mean2"),
    ]
    assert all(len(s["errors"]) == 3 * 5 for s in samples[1:])
    assert samples[4]["psnr"] > samples[1]["psnr"]
    assert all(s["density"] == pytest.approx(0.25, abs=0.03) for s in samples[1:])
    run_samples("tiny-wan", 1, (0.25,), MAP, out)
    assert len(read_samples(out)) == 6
    out.write_text(json.dumps(_sample(0, "window", None, 1.0, [], "older")) + "\n")
    with pytest.raises(GenAttnError, match=f"must be of its weights {weights}, got older in "):
        run_samples("tiny-wan", 1, (0.25,), MAP, out)


def test_the_shipped_samples_are_of_the_shipped_weights_and_in_the_table() -> None:
    samples = read_samples(MAP.parents[1] / "bench" / "adaptive_samples.jsonl")
    classes = {"tiny-sd3": SD3Transformer2DModel}
    for model in {s["model"] for s in samples}:
        found = classes.get(model, WanTransformer3DModel).from_pretrained(shipped_model(model), subfolder="transformer")
        assert {s["weights"] for s in samples if s["model"] == model} == {fingerprint(found)}
    keys = ("model", "share", "pattern", "tail")
    table = {tuple(str(row[k]) for k in keys): row for row in read_rows(MAP.parents[1] / "bench" / "adaptive.csv")}
    for row in summary(samples):
        written = table[tuple(str(row[k]) for k in keys)]
        assert int(written["captions"]) == row["captions"]
        assert float(written["psnr"]) == pytest.approx(row["psnr"], abs=2e-4)


def test_break_even_is_the_length_from_which_all_are_faster() -> None:
    rows = [
        {"backend": "cpu", "share": 0.5, "tokens": n, "speedup": s}
        for n, s in ((256, 1.2), (512, 0.9), (1024, 1.1), (2048, 1.4))
    ]
    rows += [{"backend": "cpu", "share": 0.75, "tokens": n, "speedup": 0.8} for n in (256, 2048)]
    rows += [{"backend": "cpu", "share": "adaptive", "tokens": n, "speedup": s} for n, s in ((512, 0.7), (1024, 1.3))]
    assert choice_thresholds(rows) == {("cpu", "cpu"): 1024}
    assert thresholds(rows, most=4096) == {("cpu", "cpu"): ((0.5, 1024), (0.75, 4096))}
    calls: list[str] = []
    found = fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(found) == {"a", "b"}
