"""docs/works-with.md names what tests/genattn/seam/test_lives_with.py holds."""

from pathlib import Path

import pytest
import torch

from genattn import RadialPattern, Schedule, apply
from genattn.pipelines.tiny.random.build import build_pipeline

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "works-with.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "LoRA",
        "GGUF",
        "NF4",
        "torchao",
        "enable_layerwise_casting",
        "offload",
        "enable_cache",
        "IP-Adapter",
        "fuse_qkv",
        "backend",
    ],
)
def test_every_row_has_its_test(name: str) -> None:
    source = (ROOT / "tests" / "genattn" / "seam" / "test_lives_with.py").read_text().lower().replace("_", "-")
    assert name in PAGE
    assert name.lower().replace("_", "-") in source


def test_settings_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = build_pipeline("wan")[0]
    code = PAGE.split("```python\n")[-1].split("```")[0]
    names: dict[str, object] = {"pipe": pipe}
    exec(compile(code, "works-with.md", "exec"), names)
    told = repr(names["handle"])
    with apply(build_pipeline("wan")[0], RadialPattern(decay=0.2), schedule=Schedule(dense_steps=0.3)) as same:
        assert repr(same) == told
    assert torch.is_grad_enabled()
