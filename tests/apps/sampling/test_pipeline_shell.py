"""Sizes, frame counts and file names are refused from configs alone, by the same code and in the same words."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers

from genattn.apps.sampling.legal_sizes import check_size, spatial_multiple, temporal_multiple
from genattn.apps.sampling.pipeline_shell import pipeline_shell
from genattn.apps.sampling.run import SamplingSettings, call_arguments, refuse_early
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random import build_pipeline

FAMILIES = ["wan", "hunyuan-video", "ltx", "cogvideox", "mochi", "flux", "sd3", "unet", "animatediff"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shell_has_the_sizes_of_the_pipeline(family: str, tmp_path: Path) -> None:
    pipe, _ = build_pipeline(family)
    pipe.save_pretrained(tmp_path)
    shell = pipeline_shell(tmp_path)
    assert type(shell) is type(pipe)
    assert (spatial_multiple(shell), temporal_multiple(shell)) == (spatial_multiple(pipe), temporal_multiple(pipe))
    models = [part for part in shell.components.values() if hasattr(part, "parameters")]
    assert models
    assert all(weight.is_meta for model in models for weight in model.parameters()), "weights were made"
    multiple = spatial_multiple(pipe)
    for one in (pipe, shell):
        check_size(one, 2 * multiple, 2 * multiple, None)
        with pytest.raises(GenAttnError, match=f"height must be a positive multiple of {multiple} for {type(pipe).__name__}"):
            check_size(one, 2 * multiple + 1, 2 * multiple, None)


@pytest.mark.parametrize(
    ("settings", "out", "message"),
    [
        ({"frames": 30}, None, r"frames must be 4 \* n \+ 1 for WanPipeline, got 30; nearest: 29 or 33"),
        ({"height": 70, "width": 64}, None, "height must be a positive multiple of 16 for WanPipeline, got 70"),
        ({}, Path("x.png"), r"WanPipeline needs --out ending in .mp4, .mkv, .mov, got 'x.png'"),
    ],
)
def test_refused_before_any_weight_is_read(
    random_wan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    out: Path | None,
    message: str,
) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight is read")

    for loader in (diffusers.DiffusionPipeline, diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", read)
    bare = tmp_path / "bare"
    shutil.copytree(random_wan_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = {"frames": 17, "height": 64, "width": 64, **settings}
    with pytest.raises(GenAttnError, match=message):
        refuse_early(SamplingSettings(str(random_wan_folder), **whole), out)
    if out is None:
        with pytest.raises(GenAttnError, match=message):
            call_arguments(pipeline_shell(bare), SamplingSettings(str(bare), **whole))


def test_what_cannot_be_read_so_is_let_through(tmp_path: Path) -> None:
    refuse_early(SamplingSettings("somebody/some-model", frames=30))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    assert pipeline_shell(tmp_path) is None
    refuse_early(SamplingSettings(str(tmp_path), frames=30))
