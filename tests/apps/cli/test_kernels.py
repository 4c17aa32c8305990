"""doctor and bench from the outside."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from genattn.apps.bench import attention as bench_attention
from genattn.apps.cli import evidence
from genattn.apps.cli.kernels import bench_attention_command, doctor_command
from genattn.apps.cli.long import _picture_statistics
from genattn.errors import GenAttnError, RunFailed


def test_doctor_says_what_runs_and_why_not_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    doctor_command(as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert facts["backends"]["halo"] is None
    assert "natten" in facts["backends"]
    assert all(why is None or len(why) > 5 for why in {**facts["backends"], **facts["dense"]}.values())
    doctor_command()
    assert "backends" in capsys.readouterr().out


def test_bench_checks_its_files_first(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match=r"--out must end in \.csv"):
        bench_attention_command(quick=True, out=tmp_path / "a.txt")
    with pytest.raises(GenAttnError, match=r"--plot must end in \.png"):
        bench_attention_command(quick=True, plot=tmp_path / "a.csv")
    for seconds in (float("nan"), 0, -1):
        with pytest.raises(GenAttnError, match=f"--seconds must be > 0, got {seconds}"):
            bench_attention_command(quick=True, seconds=seconds)


def test_bench_takes_every_backend_it_can_measure_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str] | None] = []
    measured = lambda *_, impls, **__: asked.append(impls) or [{"impl": name} for name in impls if name not in idle]  # noqa: E731
    monkeypatch.setattr(bench_attention, "bench_attention", measured)
    idle = {"auto"}
    bench_attention_command(quick=True, impl=list(bench_attention.MEASURABLE), out=tmp_path / "a.csv", as_json=True)
    assert set(asked[0] or ()) >= {"natten", "flex"}
    with pytest.raises(GenAttnError, match="--impl must be one of auto, triton, .*, natten, got nonsense"):
        bench_attention_command(quick=True, impl=["nonsense"], out=tmp_path / "a.csv")
    assert len(asked) == 1
    idle = {"natten", "triton"}  # who names a backend is told by the exit code, too, that it was not measured
    with pytest.raises(RunFailed, match="no case was measured for natten, triton; `genattn doctor`"):
        bench_attention_command(quick=True, impl=["natten", "triton", "cpu"], as_json=True)


def test_doctor_takes_every_head_that_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    for head_dim in (1, 4096):
        doctor_command(head_dim=head_dim, as_json=True)
        assert json.loads(capsys.readouterr().out)["backends"]["reference"] is None
    for head_dim in (0, 4097):
        with pytest.raises(GenAttnError, match=f"--head-dim must be >= 1 and at most 4096, got {head_dim}"):
            doctor_command(head_dim=head_dim)
    with pytest.raises(GenAttnError, match="give --report or --json, got both: a report is text"):
        doctor_command(report=True, as_json=True)


def test_a_picture_too_small_to_measure(tmp_path: Path) -> None:
    for size in ((7, 64), (64, 7)):
        Image.new("RGB", size).save(tmp_path / "small.png")
        with pytest.raises(GenAttnError, match=f"a picture must be at least 8 x 8 to be measured, got {size[0]} x {size[1]}"):
            _picture_statistics(tmp_path / "small.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    assert _picture_statistics(tmp_path / "small.png")["height"] == 8


def test_evidence_needs_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "find_spec", lambda name: None)
    with pytest.raises(GenAttnError, match="an installed genattn comes without what makes them; run it in a checkout"):
        evidence.evidence_command(root=None, check=True, as_json=False)
