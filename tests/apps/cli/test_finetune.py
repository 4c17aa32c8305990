"""`genattn finetune` from the outside: stopped, gone on with, samples drawn, bad clips listed, and a file that stock loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import WanPipeline

from genattn.apps.cli.finetune import finetune_command
from genattn.apps.sampling.output_files import write_video
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random.build import build_pipeline

pytest.importorskip("peft", reason="LoRA training needs peft, the train extra")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in {"a": 9, "b": 9, "short": 5, "mute": 9}.items():
        frames = np.repeat(np.repeat(rng.integers(0, 255, (count, 8, 6, 3), dtype=np.uint8), 8, 1), 8, 2)
        write_video(folder / f"{name}.mp4", frames, 8.0, {})
        if name != "mute":
            (folder / f"{name}.txt").write_text(f"clip {name}")
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("a broken one")
    return folder


def run(model: Path, data: Path, out: Path, **changes: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds one precision per process
    size = {"frames": 9, "height": 64, "width": 48}
    call = {"model": str(model), "data": data, "out": out, "lora_rank": 2, "steps": 2, "dense_layers": 0, **size}
    finetune_command(**(call | {"pattern_options": '{"decay": 0.25, "floor": 0}'} | changes))


def test_the_command_stops_goes_on_and_leaves_what_stock_loads(
    random_wan_folder: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    samples = {"sample_prompt": ["a cat"], "sample_steps": 1, "save_minutes": 1e-9}
    run(random_wan_folder, clips, out, minutes=1e-9)
    told = capsys.readouterr().out
    assert "training at 9 frames of 64 x 48" in told
    assert "0 steps on 2 clips" in told
    for name, reason in (("mute.mp4", "no caption"), ("short.mp4", "has 5 frames and 9 are needed"), ("broken.mp4", "read")):
        assert any(line.startswith(f"skipped {name}: ") and reason in line for line in told.splitlines()), told
    encoded = {path.name: path.stat().st_mtime_ns for path in (out / "cache").glob("*.safetensors")}
    run(random_wan_folder, clips, out, **samples, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["clips"], len(found["skipped"])) == (2, 2, 3)
    assert "sparse" in found["sparse"]
    assert {path.name: path.stat().st_mtime_ns for path in (out / "cache").glob("*.safetensors")} == encoded
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000001-0.mp4", "step-000002-0.mp4"]
    pipe = WanPipeline.from_pretrained(random_wan_folder)
    pipe.load_lora_weights(out / "lora")
    assert pipe.get_active_adapters()
    moved = [p for name, p in pipe.transformer.named_parameters() if "lora_B" in name]
    assert moved
    assert all(bool(torch.isfinite(p).all()) and bool(p.any()) for p in moved)


def test_what_the_command_refuses(random_wan_folder: Path, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="--data must name a folder"):
        run(random_wan_folder, tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(GenAttnError, match="no clip of the dataset can be used, 5 were skipped.*13 are needed"):
        run(random_wan_folder, clips, tmp_path / "run", frames=13)
    with pytest.raises(GenAttnError, match="rank must be >= 1"):
        run(random_wan_folder, clips, tmp_path / "run", lora_rank=0)
    for seed in (-1, 2**32):
        with pytest.raises(GenAttnError, match=f"--seed must lie in 0 to 4294967295 for a training, got {seed}"):
            run(random_wan_folder, clips, tmp_path / "run", seed=seed)
    for name in ("frames", "height", "width"):
        with pytest.raises(GenAttnError, match=f"--{name} must be >= 1, got 0; leave it out for the model's own"):
            run(random_wan_folder, clips, tmp_path / "run", **{name: 0})
    pictures, _ = build_pipeline("sd3")
    pictures.save_pretrained(tmp_path / "sd3")
    with pytest.raises(GenAttnError, match="StableDiffusion3Pipeline makes pictures; finetune is for video models"):
        run(tmp_path / "sd3", clips, tmp_path / "run")
