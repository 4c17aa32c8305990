"""What commands print is in words: no names of variables, no brackets, no endless decimals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import genattn
from genattn.apps.cli.long import measure_command
from genattn.apps.cli.patterns import simulate_command
from genattn.apps.cli.printing import in_print, in_words, print_table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (11.11111111, "11.11"),
        ((0.5, 2), "0.5, 2"),
        ([], "none"),
        ({"caption_match": 0.97444, "seed": 0}, "caption match 0.9744, seed 0"),
        ("out/x", "out/x"),
    ],
)
def test_values(value: Any, shown: str) -> None:
    assert in_print(value) == shown


def test_a_table_is_headed_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"attention": "radial", "peak_memory_gb": 0.8021, "psnr": 30.0, "psnr_low": 29.0, "psnr_high": 31.0}])
    told = capsys.readouterr().out
    assert "peak GB" in told
    assert "PSNR dB" in told
    assert "30 [29, 31]" in told
    assert "_" not in told
    assert in_words("drift_per_100_frames") == "drift per 100 frames"


def test_simulate_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    simulate_command("30x48x80", "18x24x24", "16x8x8", tile_q="4x8x8", tile_k="2x8x8", attention_share=0.607)
    told = capsys.readouterr().out
    assert "whole run faster at most, by slowest tile" in told
    assert "2.23x" in told  # the paper's figure for HunyuanVideo
    assert "11.11x" in told
    assert "30x48x80" in told
    assert not {"_", "(", "["} & set(told)


def test_measure_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    genattn.save_video(np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8), "a.mp4", fps=8)
    measure_command(Path("a.mp4"))
    table = capsys.readouterr().out.split("made with")[0]
    assert "drift per 100 frames, brightness" in table
    assert "frames per second" in table
    assert not {"_", "[", "{"} & set(table)
