"""A folder or hub id that brings code of its own is refused, and none of that code runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from genattn.apps.sampling.load_pipeline import load_pipeline
from genattn.errors import GenAttnError


def _bring_code(folder: Path, file: str, name: str, base: str) -> Path:
    """A module that leaves a mark when it is imported; the mark's place."""
    mark = folder.parent / "it-ran"
    lines = ("from pathlib import Path", base, f"Path({str(mark)!r}).touch()", f"class {name}(Base):", "    pass", "")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("\n".join(lines))
    return mark


def _changed(folder: Path, **entries: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | entries))


def _modular(folder: Path) -> Path:
    (folder / "model_index.json").unlink()
    (folder / "modular_model_index.json").write_text(json.dumps({"_class_name": "ModularPipeline"}))
    (folder / "modular_config.json").write_text(
        json.dumps({"_class_name": "Mine", "auto_map": {"ModularPipelineBlocks": "blocks.Mine"}})
    )
    return _bring_code(folder, "blocks.py", "Mine", "from diffusers import ModularPipelineBlocks as Base")


def _pipeline(folder: Path) -> Path:
    _changed(folder, _class_name=["pipeline", "Mine"])
    return _bring_code(folder, "pipeline.py", "Mine", "from diffusers import WanPipeline as Base")


def _component(folder: Path) -> Path:
    _changed(folder, scheduler=["own_scheduler", "Mine"])
    base = "from diffusers import FlowMatchEulerDiscreteScheduler as Base"
    return _bring_code(folder, "scheduler/own_scheduler.py", "Mine", base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [_modular, _pipeline, _component])
def test_code_of_a_folder_is_refused_and_not_run(
    kind: object, random_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(random_wan_folder, tmp_path / "model"))
    mark = kind(folder)  # type: ignore[operator]
    with pytest.raises(GenAttnError, match="code"):
        load_pipeline(folder, device="cpu")
    assert not mark.exists()
