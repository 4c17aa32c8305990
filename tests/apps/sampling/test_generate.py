"""`genattn generate` from the outside: files, report, refusals, and nothing left behind by a run that fails."""

import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genattn.apps.sampling.attention_names import attention_from_name, pattern_from_name
from genattn.apps.sampling.generate import GenerateRequest, generate, without_folders
from genattn.apps.sampling.output_files import read_video
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    SamplingSettings,
    call_arguments,
    default_size,
    open_pipeline,
    run_once,
    to_uint8,
)
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random.build import build_pipeline

RADIAL = AttentionSettings("radial", pattern_from_name("radial"), dense_steps=1, dense_layers=0)


@pytest.fixture
def settings(random_wan_folder: Path) -> SamplingSettings:
    return SamplingSettings(model=str(random_wan_folder), frames=17, height=128, width=128, steps=2, guidance_scale=3.0)


def _request(settings: SamplingSettings, out: Path, **changes: object) -> GenerateRequest:
    values = {"prompt": "a cat", "out": out, "attention": RADIAL, "settings": settings, **changes}
    return GenerateRequest(**values)  # type: ignore[arg-type]


def test_files_and_report(settings: SamplingSettings, tmp_path: Path) -> None:
    report = generate(_request(settings, tmp_path / "a.mp4", compare_dense=True, seed=4))
    assert sorted(os.listdir(tmp_path)) == ["a.dense.mp4", "a.json", "a.mp4", "a.side-by-side.mp4"]
    frames, tags = read_video(tmp_path / "a.mp4")
    assert frames.shape == (17, 128, 128, 3)
    assert (tags["seed"], tags["prompt"], tags["attention"]) == (4, "a cat", "radial")
    assert read_video(tmp_path / "a.side-by-side.mp4")[0].shape == (17, 128, 256, 3)
    assert json.loads((tmp_path / "a.json").read_text()) == report
    sparse, dense = report["runs"]
    assert 0 < sparse["sparse_density"] < 1
    assert sparse["sparse_density"] < sparse["density"] < 1  # one dense step of two
    assert dense["density"] == 1
    assert sparse["seconds"] > 0
    assert {"psnr", "ssim"} <= set(sparse)
    assert sparse["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"], rel=0.05)
    assert {"torch", "diffusers", "genattn"} <= set(report["versions"])


def test_a_clip_that_cannot_be_written_keeps_the_report_of_the_one_before(
    settings: SamplingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = _request(settings, tmp_path / "a.mp4", attention=DENSE)
    generate(request)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("genattn.apps.sampling.generate.write_video", full)
    with pytest.raises(OSError, match="No space"):
        generate(request)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_name_takes_the_models_own_window(settings: SamplingSettings, tmp_path: Path) -> None:
    attention = AttentionSettings("neighborhood", attention_from_name("neighborhood"), 1, 0)
    run = generate(_request(settings, tmp_path / "a.mp4", attention=attention))["runs"][0]
    assert run["preset"].startswith("'gna': no preset is known for WanTransformer3DModel with 3 layers of 2 heads")
    assert run["sparse_density"] == 0.4  # a window of 4x4x8 of 5x8x8 tokens


def test_auto_stays_dense_below_the_break_even_and_says_so(settings: SamplingSettings, tmp_path: Path) -> None:
    attention = AttentionSettings("auto", attention_from_name("auto"), given=frozenset())
    report = generate(_request(settings, tmp_path / "a.mp4", attention=attention, compare_dense=True))
    sparse, dense = report["runs"]
    assert (report["dense_steps"], report["dense_layers"]) == (None, None)  # the preset's
    assert sparse["preset"].startswith("'auto': no preset is known for")
    assert "sparse from " in sparse["preset"]
    assert (sparse["density"], sparse["ssim"]) == (1, 1)
    assert any("tokens" in note for note in sparse["notes"])
    assert "preset" not in dense


@pytest.mark.parametrize("fails", [False, True])
def test_the_preview_goes_with_the_run(
    fails: bool, settings: SamplingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genattn.apps.sampling import generate as module

    stock, seen = module.run_once, []

    def run_once(*given: Any) -> Any:
        preview = given[-1]
        preview.path.write_bytes(b"as far as it is")
        seen.append(preview.path.name)
        if fails:
            raise RuntimeError("on purpose")
        return stock(*given)

    monkeypatch.setattr(module, "run_once", run_once)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(_request(settings, tmp_path / "a.mp4"))
    else:
        generate(_request(settings, tmp_path / "a.mp4"))
    assert seen == ["a.preview.png"]
    assert sorted(os.listdir(tmp_path)) == ([] if fails else ["a.json", "a.mp4"])


def test_same_seed_same_video(settings: SamplingSettings, tmp_path: Path) -> None:
    clips = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(_request(settings, tmp_path / f"{name}.mp4", seed=seed))
        clips.append(read_video(tmp_path / f"{name}.mp4")[0])
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_dense_equals_the_stock_pipeline(settings: SamplingSettings, tmp_path: Path) -> None:
    from genattn.apps.sampling.run import run_once

    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    ours = run_once(pipe, call, "a cat", 3, DENSE, "dense").frames
    stock = pipe(**call, prompt="a cat", generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    assert np.array_equal(ours, to_uint8(stock))


def test_nan_output_writes_nothing(settings: SamplingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(value: SamplingSettings) -> object:
        pipe = open_pipeline(value)
        with torch.no_grad():
            pipe.transformer.proj_out.bias.fill_(float("nan"))
        return pipe

    monkeypatch.setattr("genattn.apps.sampling.generate.open_pipeline", spoiled)
    with pytest.raises(GenAttnError, match="values that are not finite; nothing was written"):
        generate(_request(settings, tmp_path / "a.mp4"))
    assert os.listdir(tmp_path) == []


def test_a_long_prompt_is_warned(settings: SamplingSettings, tmp_path: Path) -> None:
    report = generate(_request(settings, tmp_path / "a.mp4", prompt="a cat " * 400))
    assert len(report["warnings"]) == 1
    assert "tokens, tokenizer reads the first 512; shorten it" in report["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "--prompt must say what to show"),
        ({"fps": 0.0}, r"--fps must lie in \(0, 240\], got 0.0"),
        ({"attention": DENSE, "compare_dense": True}, "--attention is dense already"),
        ({"out": Path("/proc/nowhere/a.mp4")}, "cannot be written"),
    ],
)
def test_requests_refused(settings: SamplingSettings, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        _request(settings, **{"out": tmp_path / "a.mp4", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be >= 1, got 0"),
        ({"guidance_scale": float("nan")}, "--guidance-scale must be a finite number"),
        ({"cpu_offload": "disk"}, "--cpu-offload must be model or group, got 'disk'"),
    ],
)
def test_settings_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        SamplingSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "layers"), [(-1, 0), (1.5, 0), (0, -1)])
def test_attention_settings_refused(steps: float, layers: int) -> None:
    with pytest.raises(GenAttnError, match="--dense-(steps|layers) must be"):
        AttentionSettings("radial", None, steps, layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 10}, r"frames must be 4 \* n \+ 1 .* nearest: 9 or 13"),
        ({"height": 40}, "height must be a positive multiple of 16 .* nearest: 32 or 48"),
        ({"width": 8}, "width must be a positive multiple of 16 .* nearest: 16"),
    ],
)
def test_sizes_refused(random_wan_folder: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    values = {"frames": 9, "height": 32, "width": 32, **changes}
    settings = SamplingSettings(model=str(random_wan_folder), steps=1, **values)
    with pytest.raises(GenAttnError, match=message):
        generate(_request(settings, tmp_path / "a.mp4"))
    assert os.listdir(tmp_path) == []


def test_a_picture_name_for_a_video_pipeline_is_refused(settings: SamplingSettings, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="WanPipeline needs --out ending in .mp4"):
        generate(_request(settings, tmp_path / "a.png"))


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "genattn", *arguments]


def test_one_line_and_exit_code_2(random_wan_folder: Path, tmp_path: Path) -> None:
    base = ["generate", "--prompt", "a cat", "--model", str(random_wan_folder)]
    for more, message in (
        (["--attention", "foo", "--out", str(tmp_path / "a.mp4")], "must be one of auto, dense, radial"),
        (["--frames", "10", "--height", "32", "--width", "32", "--out", str(tmp_path / "a.mp4")], "nearest: 9 or 13"),
    ):
        done = subprocess.run(_command(*base, *more), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("genattn: ") == 1
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def _read_until(master: int, word: str, seconds: float) -> str:
    """What a command writes to its terminal until `word` comes, the terminal closes, or the time is over."""
    seen = ""
    deadline = time.monotonic() + seconds
    while word not in seen and time.monotonic() < deadline:
        if not select.select([master], [], [], 1.0)[0]:
            continue
        try:
            seen += os.read(master, 4096).decode(errors="replace")
        except OSError:  # Linux's way to say that the other side has closed
            break
    return seen


def test_interrupt_leaves_nothing(random_wan_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--prompt", "a cat", "--model", str(random_wan_folder), "--out", str(tmp_path / "a.mp4")]
    arguments += ["--steps", "100000", "--frames", "9", "--height", "32", "--width", "32"]
    # a shell that runs the tests in the background has its children ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    master, terminal = pty.openpty()  # the bar, which tells that steps are running, is for terminals only
    termios.tcsetwinsize(terminal, (24, 200))  # without a size there is no room for a bar
    process = subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, stderr=terminal, preexec_fn=heed)
    os.close(terminal)
    try:
        seen = _read_until(master, "/100000", 120)
        assert "/100000" in seen, seen[-500:]
        for _ in range(10):
            # Python drops an interrupt that comes within a finaliser; a person would press the keys again
            process.send_signal(signal.SIGINT)
            seen += _read_until(master, "unfinished file", 15)
            if "unfinished file" in seen:
                break
        else:
            pytest.fail(f"ten interrupts did not stop it: {seen[-500:]}")
        assert process.wait(timeout=60) == 130, seen[-500:]
        assert "genattn: stopped; no unfinished file was left" in seen
        assert os.listdir(tmp_path) == []
    finally:
        process.kill()
        process.communicate()
        os.close(master)


def test_oracle_scores_of_a_true_clip() -> None:
    from genattn.apps.sampling.generate import oracle_scores
    from genattn.pipelines.tiny.world import parse_caption, render

    prompt = "a red circle moves right on a dark background"
    clip = render(parse_caption(prompt), 29, 64, 64)
    scores = oracle_scores(clip, prompt)
    assert [scores[name] for name in ("colour", "shape", "motion", "background", "count")] == [1.0] * 5
    assert oracle_scores(clip, "a blue square moves left on a light background")["colour"] == 0
    assert oracle_scores(clip, "a cat") is None


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("ProfiledPattern(tail='mean2', path='/home/me/m.safetensors', density=0.4)",) * 2,
        ("ProfiledPattern(path='C:\\\\Users\\\\me\\\\m.safetensors')", "ProfiledPattern(path='m.safetensors')"),
        ("/home/me/maps/m.safetensors", "m.safetensors"),
        ("RadialPattern(decay=0.2, variant='genattn')",) * 2,
        ("settings", "settings"),
    ],
)
def test_a_clip_names_files_without_their_folders(told: str, wanted: str) -> None:
    assert without_folders(told) == wanted.replace("/home/me/", "")


def test_frames_for_a_picture_model_are_refused(random_wan_folder: Path) -> None:
    pictures, _ = build_pipeline("sd3")
    with pytest.raises(GenAttnError, match="StableDiffusion3Pipeline makes pictures, got --frames 9; leave it out"):
        call_arguments(pictures, SamplingSettings(frames=9))


def test_a_model_that_tells_no_size_asks_for_one() -> None:
    class Sizeless:
        config: dict[str, str] = {}  # noqa: RUF012

        def __call__(self, prompt: str, height: int | None = None, width: int | None = None, num_frames: int = 5) -> None: ...

    with pytest.raises(GenAttnError, match="Sizeless has no default height and width; give --height"):
        default_size(Sizeless())


def test_what_the_pipeline_itself_refuses_is_one_line(settings: SamplingSettings, tmp_path: Path) -> None:
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings) | {"height": 33}
    with pytest.raises(GenAttnError, match="WanPipeline refuses this call: `height` and `width` have to be divisible by"):
        run_once(pipe, call, "a cat", 0, DENSE, "dense")
