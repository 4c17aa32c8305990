"""The recipes of docs/recipes.md, each on the tiny pipeline of its family: other id, size and device, the same lines else."""

import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from genattn.pipelines.tiny.random.build import build_pipeline

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"## (\w+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))
FAMILIES = {
    "Wan": "wan",
    "HunyuanVideo": "hunyuan-video",
    "FLUX": "flux",
    "SD3": "sd3",
    "LTX": "ltx",
    "CogVideoX": "cogvideox",
    "AnimateDiff": "animatediff",
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_every_promised_family_has_a_recipe() -> None:
    assert list(RECIPES) == list(FAMILIES)


def shrunk(code: str, call: dict[str, Any]) -> str:
    """The recipe with tiny sizes on the CPU, and the few arguments that a tiny text encoder needs."""
    code = code.replace('"cuda"', '"cpu"').replace("torch.bfloat16", "torch.float32").replace("torch.float16", "torch.float32")
    for name in ("height", "width", "num_frames"):
        # not in the film that is longer than a clip
        code = re.sub(rf"(pipe\(prompt.*?){name}=\d+", rf"\g<1>{name}={call.get(name)}", code)
    more = {k: call[k] for k in ("max_sequence_length", "prompt_template") if k in call} | {"num_inference_steps": 8}
    return code.replace("pipe(prompt=", f"pipe({', '.join(f'{k}={v!r}' for k, v in more.items())}, prompt=")


@pytest.mark.parametrize("name", FAMILIES)
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, call = build_pipeline(FAMILIES[name])
    pipe.save_pretrained(tmp_path / "model")
    cls = type(pipe)
    # a saved AnimateDiff folder holds its UNet with the motion modules in it; a hub one does not
    opened = cls.from_pretrained
    monkeypatch.setattr(
        cls, "from_pretrained", lambda _, motion_adapter=None, dtype=None: opened(tmp_path / "model", dtype=dtype)
    )
    adapter = diffusers.MotionAdapter.from_pretrained
    monkeypatch.setattr(
        diffusers.MotionAdapter, "from_pretrained", lambda name, **kw: adapter(name, **kw) if Path(name).is_dir() else None
    )
    code = shrunk(RECIPES[name], call).replace(
        "num_frames=256, partitions=4", "num_frames=20, height=32, width=24, num_inference_steps=16"
    )
    exec(compile(code, f"recipe {name}", "exec"), {"__name__": "recipe"})  # the page's own lines
    pictures = [*tmp_path.glob("*.png"), *tmp_path.glob("*.mp4")]
    assert len(pictures) == 1, "each recipe ends in one file"
    assert "genattn" in sys.modules
    assert ("out/fox" in code) == (tmp_path / "out" / "fox" / "video.mp4").is_file()
    assert torch.get_default_dtype() is torch.float32
