"""Commands that need geometry only."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import genattn
from genattn.apps.cli.patterns import _save_first, plan_command, show_command, simulate_command
from genattn.apps.sampling.shapes import parse_shape
from genattn.errors import GenAttnError
from genattn.patterns.radial import RadialPattern
from genattn.seam.settings_file import load_sparse


@pytest.mark.parametrize(("text", "shape"), [("7", (7,)), ("30x48x80", (30, 48, 80)), ("-1x4x16", (-1, 4, 16))])
def test_shapes(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape("--grid", text) == shape


@pytest.mark.parametrize("text", ["", "x", "3,4", "3x4x5x6", "3x"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(GenAttnError, match="--grid must be 1 to 3 whole numbers joined by x"):
        parse_shape("--grid", text)


def test_simulate_prints_the_published_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """GNA's HunyuanVideo row: window 18x24x24, stride 16x8x8, tiles 4x8x8 and 2x8x8 (arXiv 2504.16922)."""
    simulate_command(
        "30x48x80", "18x24x24", "16x8x8", tile_q="4x8x8", tile_k="2x8x8", block=128, attention_share=0.607, as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    assert found["worst_tile"] == pytest.approx(11.11, abs=0.02)
    assert found["end_to_end"][0] == pytest.approx(2.23, abs=0.02)


def test_plan_ranks_by_predicted_speed(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command("wan-14b", "720x1280", 81, target_density=0.25, dense_steps=0.25, dense_layers=1, steps=None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    speeds = [setting["run_speedup"] for setting in found["settings"] if not setting["published"]]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 1.3
    assert all("Pattern" in setting["pattern"] for setting in found["settings"])
    assert found["tokens"] == "grid 21x45x80"
    assert found["nearby"]


def test_plan_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command("wan-1.3b", None, None, target_density=0.25, dense_steps=0.25, dense_layers=1, steps=None, as_json=False)
    printed = capsys.readouterr().out
    assert "published settings first" in printed
    assert "genattn.apply(pipe, genattn.RadialPattern(decay=0.2), dense_steps=0.25, dense_layers=1)" in printed
    assert "480x832" in printed
    assert "genattn generate --model FOLDER_OR_ID --settings settings.json" in printed
    assert "legal sizes nearby" in printed
    assert "\nsource of radial official: mit-han-lab/radial-attention" in printed
    assert len([line for line in printed.splitlines() if line.startswith("│ neighborhood")]) > 5, "a setting is one line"


def test_show_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_command("4x8x8", "radial", block=16, out=tmp_path / "a.png", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    layout = genattn.TokenLayout.from_grid((4, 8, 8))
    assert facts["density"] == pytest.approx(genattn.RadialPattern().plan(layout, 16, 16).density)
    assert (tmp_path / "a.png").stat().st_size > 1000
    show_command("4x8x8", "radial", block=16)
    assert "density" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_command("wan-14b", "720"), "--size must be HEIGHTxWIDTH, e.g. 720x1280, got '720'"),
        (lambda: plan_command("nonsense"), "model must be a pipeline folder or one of wan-1.3b"),
        (lambda: plan_command("hunyuan"), "got 'hunyuan'; did you mean hunyuan-video or hunyuan-video-1.5"),
        (lambda: plan_command("wan14b"), "got 'wan14b'; did you mean wan-14b"),
        (lambda: plan_command(dense_steps=float("nan")), r"dense_steps must be a share of the steps in \[0, 1\], got nan"),
        (lambda: plan_command(dense_steps=-1), r"dense_steps must be a share of the steps in \[0, 1\], got -1"),
        (lambda: plan_command(dense_layers=-1), "dense_layers must be >= 0, got -1"),
        (lambda: plan_command(steps=0), "steps must be >= 1, got 0"),
        (lambda: plan_command("none", min_psnr=float("nan")), "--min-psnr must be a number of dB, got nan"),
        (lambda: simulate_command("8x8x8", "4x4x4", block=0), "block must be >= 1, got 0"),
        (lambda: show_command("8x8x8", query="4x4x4"), "--query is drawn in a picture, and none was asked for; add --out"),
        (lambda: show_command("4x8x8", "dense"), "dense attention has none"),
        (lambda: show_command("2000x2000x2000"), "at most 67,108,864 tokens, got 8,000,000,000"),
        (lambda: show_command("100x300x300"), "take tiles of at least 550 tokens, or draw a smaller grid"),
    ],
)
def test_refusals(call: Callable[[], None], message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        call()


def test_plan_writes_a_setting_that_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "settings.json"
    plan_command("wan-14b", "720x1280", 81, target_density=0.25, dense_steps=0.25, dense_layers=1, steps=None, out=out)
    assert load_sparse(out).pattern == RadialPattern(decay=0.2)
    assert f"genattn generate --model FOLDER_OR_ID --settings {out}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(GenAttnError, match="--out must end in .json"):
        plan_command("wan-14b", out=tmp_path / "a.txt", target_density=0.25, dense_steps=0.25, dense_layers=1, steps=None)


def test_the_version_and_the_help_need_no_torch() -> None:
    code = "import sys; from genattn.apps.cli import root; print(sorted(m for m in ('torch', 'diffusers') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    done = subprocess.run([sys.executable, "-m", "genattn", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"genattn {genattn.__version__}\n")


def test_a_plan_without_a_setting_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="no setting comes near this density, .*; try another --target-density"):
        _save_first([], tmp_path / "settings.json")
    assert not list(tmp_path.iterdir())
