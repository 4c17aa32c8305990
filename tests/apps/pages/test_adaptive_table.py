"""The generated tables of docs/adaptive.md, and the findings behind the evidence."""

import csv
from pathlib import Path
from typing import Any

import pytest

from genattn.apps.pages.adaptive_table import (
    adaptive_table,
    break_even_table,
    end_to_end_table,
    first_screen_table,
    selection_table,
    tail_gain_table,
)
from genattn.apps.pages.evidence_patterns import clusters, error_aware, profiled, stand_in, two_means
from genattn.apps.pages.evidence_tables import MINIATURE, NOT, NotMeasuredError, Tables
from genattn.errors import GenAttnError

FACTS = {"device": "CPU, 1 threads", "torch_version": "2", "date": "2026-01-01", "commit": "abc"}


def _row(pattern: str, tail: str, error: float, psnr: float, share: float = 0.25, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"model": "tiny-wan", "share": share, "pattern": pattern, "tail": tail, "captions": 4}
    row |= {"density": share, "error": error, "ssim": 0.9, "oracle": 1.0, "seconds": 3.0, "speedup": 0.9}
    for name, value in (("psnr", psnr), ("psnr_gain", psnr - 20)):
        row |= {name: value, f"{name}_low": value - 1, f"{name}_high": value + 1}
    return row | FACTS | more


ROWS = [
    _row("radial", "", 0.6, 20.0),
    _row("top-k", "", 0.5, 21.0),
    _row("top-k", "mean", 0.2, 25.0),
    _row("error-aware", "mean", 0.15, 26.0),
    _row("clusters", "", 0.55, 20.0),
    _row("profiled", "mean", 0.12, 28.0),
]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_gains_of_two_means_are_shown_by_model_and_share(tmp_path: Path) -> None:
    gains = {"tail_gain": 5.25, "tail_gain_low": 4.0, "tail_gain_high": 6.5}
    none = dict.fromkeys(gains, "")
    rows = [_row("window", tail, 0.1, psnr, share, **some) for share in (0.25, 0.4) for tail, psnr, some in (
        ("", 20.0, none), ("mean", 22.0, gains), ("mean2", 25.0 + share, gains))]  # fmt: skip
    rows += [_row("top-k", "", 0.5, 21.0, **none), _row("radial", "mean", 0.5, 21.0, **none)]
    text = tail_gain_table(_write(tmp_path, "adaptive", rows))
    assert "**tiny-wan, share 0.25**" in text
    assert "**tiny-wan, share 0.4**" in text
    assert "| window (static) | 20.0 dB | 22.0 dB | 25.4 dB | +5.2 [4.0, 6.5] dB | 4 |" in text
    assert "top-k" not in text, "without two means there is nothing to compare"


def test_every_row_is_shown_in_order(tmp_path: Path) -> None:
    text = adaptive_table(_write(tmp_path, "adaptive", ROWS))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        "radial (static, the released mask)",
        "top-k",
        "top-k",
        "error-aware",
        "clusters",
        "profiled map",
    ]
    assert "| profiled map | mean | 0.250 | 0.120 | 28.0 [27.0, 29.0] | +8.0 [7.0, 9.0] |" in text
    assert "**tiny-wan, share 0.25**" in text
    with pytest.raises(GenAttnError, match="is not there; measure first"):
        adaptive_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("model\n")
    with pytest.raises(GenAttnError, match="must hold rows, got none"):
        adaptive_table(tmp_path / "empty.csv")


def test_costs_and_break_even(tmp_path: Path) -> None:
    row = {"pattern": "top-k", "tokens": 8192, "heads": 2, "head_dim": 64, "density": 0.27, "share": 0.012, "of_saved": 0.02}
    text = selection_table(_write(tmp_path, "selection", [row | FACTS, row | FACTS | {"pattern": "x", "of_saved": ""}]))
    assert "| top-k | 8192 | 0.27 | 1.2% | 2.0% |" in text
    assert "| x | 8192 | 0.27 | 1.2% | nothing saved |" in text
    rows = [
        {"backend": "cpu", "share": 0.25, "tokens": n, "speedup": s, "heads": 2, "head_dim": 64} | FACTS
        for n, s in ((256, 0.8), (512, 1.25))
    ]
    assert "| cpu | 0.25 | 0.80x | 1.25x |" in break_even_table(_write(tmp_path, "break_even", rows))


def test_findings(tmp_path: Path) -> None:
    _write(tmp_path, "adaptive", ROWS)
    tables = Tables(tmp_path)
    assert stand_in(tables).verdict == MINIATURE
    assert "0.500 and 0.200" in stand_in(tables).measured
    assert error_aware(tables).verdict == MINIATURE
    assert clusters(tables).verdict == NOT
    assert profiled(tables).verdict == MINIATURE
    worse = tmp_path / "worse"
    worse.mkdir()
    _write(worse, "adaptive", [*ROWS[:3], _row("profiled", "mean", 0.24, 24.0)])
    assert profiled(Tables(worse)).verdict == NOT
    with pytest.raises(NotMeasuredError, match="has no errors of"):
        clusters(Tables(worse))


def test_two_means_must_gain_for_every_pattern(tmp_path: Path) -> None:
    for name, low, verdict in (("good", 4.0, MINIATURE), ("bad", -0.5, NOT)):
        gains = {"tail_gain": 5.25, "tail_gain_low": 4.0, "tail_gain_high": 6.5}
        rows = [_row(p, "mean2", 0.1, 25.0, **(gains | {"tail_gain_low": at})) for p, at in (("window", 4.0), ("top-k", low))]
        (tmp_path / name).mkdir()
        _write(tmp_path / name, "adaptive", [*rows, _row("radial", "", 0.3, 20.0, **dict.fromkeys(gains, ""))])
        found = two_means(Tables(tmp_path / name))
        assert found.verdict == verdict
        assert "0.25: window +5.2 [4.0, 6.5], top-k +5.2 [" in found.measured
    (tmp_path / "none").mkdir()
    _write(tmp_path / "none", "adaptive", ROWS)
    with pytest.raises(NotMeasuredError, match="no rows with two means"):
        two_means(Tables(tmp_path / "none"))


def _call(setting: str, psnr: float | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": "tiny",
        "frames": 61,
        "tokens": 4096,
        "setting": setting,
        "captions": 20,
        "density": 0.25,
        "ssim": 0.9,
    }
    row |= {"peak_gb": 1.25, "threads": 2}
    row |= {"speedup_processor": 2.5, "speedup_denoiser_processor": 3.5, "seconds": 4.0, "denoiser_seconds": 3.0}
    row |= {"speedup": 2.0, "speedup_denoiser": 3.0, "psnr": "" if psnr is None else psnr}
    for name, value in (("psnr", psnr or 0), ("oracle", 0.875), ("oracle_change", -0.05)):
        row |= {f"{name}_low": value - 1, f"{name}_high": value + 1} | ({} if name == "psnr" else {name: value})
    return row | FACTS | more


def test_whole_calls_show_both_clocks_and_the_paired_oracle(tmp_path: Path) -> None:
    rows = [_call("dense", None), _call("profiled 0.25 + mean2", 27.0), _call("window", 20.0, seconds="", speedup="")]
    rows.append(_call("dense", None, frames=125, tokens=8192))
    file = _write(tmp_path, "whole", rows)
    lines = end_to_end_table(file).splitlines()
    assert lines[0] == "**tiny, 61 frames, 4,096 tokens**"
    assert "| profiled 0.25 + mean2 | 25% | 2.00x, 4.0 s (2.50x) | 3.00x, 3.0 s (3.50x) | 27.0 [26.0, 28.0] |" in lines[5]
    assert lines[5].endswith("| 0.900 | 0.88 | -0.05 [-1.05, 0.95] | 1.25 |")
    assert "| window | 25% | (2.50x) |" in lines[6]
    assert "20 captions. Seconds by the clock, 2 threads." in lines[8]


def test_the_first_screen_shows_few_settings_in_words_of_a_visitor(tmp_path: Path) -> None:
    rows = [
        _call("window", 10.0, frames=125),
        _call("window", 20.0),
        _call("radial + mean", 16.0),
        _call("dense", None),
        _call("profiled 0.25 + mean2", 27.4),
        _call("window", 30.0, model="another"),
        _call("narrow window + mean2", 22.0, seconds="", speedup=""),  # nobody looked at a clock
    ]
    lines = first_screen_table(_write(tmp_path, "whole", rows), "tiny").splitlines()
    assert lines[2:5] == [
        "| dense | 4.0 s | - | - | 88% |",
        "| profiled 0.25 + tail | 4.0 s | 2.0x | 27 dB | 88% |",
        "| window | 4.0 s | 2.0x | 20 dB | 88% |",
    ]
    assert "20 held-out captions" in lines[-1]
