"""explain and measure from the outside."""

import json
from pathlib import Path

import numpy as np
import pytest

from genattn.apps.cli import options
from genattn.apps.cli.long import measure_command
from genattn.apps.cli.sampling import explain_command
from genattn.apps.sampling.output_files import write_video
from genattn.apps.sampling.run import AttentionSettings
from genattn.errors import GenAttnError


def test_explain_tells_without_denoising(random_wan_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"frames": 17, "height": 128, "width": 128, "steps": 8}
    explain_command(prompt="a cat", model=str(random_wan_folder), **size, as_json=True)
    told = capsys.readouterr()
    assert "it/s" not in told.err  # no bar that stays at nothing
    found = json.loads(told.out)
    assert found["layout"] == "grid 5x8x8"
    assert found["num_steps"] == 8
    first, second = found["sites"][:2]
    assert (first["sparse"], first["dense"]) == (0, 8)
    assert (second["sparse"], second["dense"]) == (6, 2)
    assert 0 < found["flops_share"] < 1
    with pytest.raises(GenAttnError, match="dense attention has none"):
        explain_command(model=str(random_wan_folder), attention="dense")


def test_explain_and_generate_read_the_same_options_alike() -> None:
    """What is not named is the preset's in both, so that the forecast is of the run."""
    seen: list[AttentionSettings] = []
    commands = [options.attention_options(own=own)(lambda attention: seen.append(attention)) for own in (False, True)]
    for given, schedule in (
        ({"attention": "auto"}, {}),
        ({"attention": "auto", "dense_layers": 2}, {"dense_layers": 2}),
        ({"attention": "radial"}, {"dense_steps": 0.25, "dense_layers": 1}),
        ({"attention": "radial", "dense_steps": 0.0}, {"dense_steps": 0, "dense_layers": 1}),
    ):
        for command in commands:
            command(**given)
            assert seen[-1].schedule == schedule
    commands[0]()
    commands[1]()
    assert [each.name for each in seen[-2:]] == ["radial", "auto"]


def test_measure_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = np.zeros((12, 64, 64, 3), dtype=np.uint8)
    for frame in range(12):
        clip[frame, 20:40, 4 + 3 * frame : 24 + 3 * frame] = 200
    write_video(tmp_path / "a.mp4", clip, 8, {})
    measure_command(tmp_path / "a.mp4", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["dynamic_degree"] > 0
    with pytest.raises(GenAttnError, match=r"none\.mp4' is no file; give a video or a picture that exists"):
        measure_command(tmp_path / "none.mp4")
