"""The same plugins in modular pipelines, whose denoise loop and guider are blocks of their own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn import DensePattern, RadialPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.seam.handle import apply

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def wan(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    from diffusers.modular_pipelines.wan import encoders
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    if not hasattr(encoders, "ftfy"):  # only mends broken text
        monkeypatch.setattr(encoders, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    stock, _ = build_pipeline("wan")
    return modular(WanBlocks(), stock), {"height": 64, "width": 48, "num_frames": 9, "max_sequence_length": 16}


def sd3(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    blocks = pytest.importorskip(
        "diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3",
        reason="this diffusers has no modular SD3",
    )
    stock, _ = build_pipeline("sd3")
    return modular(blocks.StableDiffusion3AutoBlocks(), stock), {"height": 16, "width": 12, "max_sequence_length": 16}


def modular(blocks: Any, stock: Any) -> Any:
    pipe = blocks.init_pipeline()
    wanted = set(pipe._component_specs)
    pipe.update_components(**{k: v for k, v in stock.components.items() if k in wanted and v is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("make", [wan, sd3], ids=["wan", "sd3"])
def test_plugins_in_a_modular_pipeline(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs = make(monkeypatch)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        out: torch.Tensor = pipe(prompt="a cat", num_inference_steps=4, generator=generator, output="latents", **kwargs)
        return out

    stock = sample()
    with apply(pipe, DensePattern()) as handle:
        assert torch.equal(sample(), stock)
        assert set(handle.report().dense_reasons) == {
            "the pattern is dense",
            "first dense steps (dense_steps=0.25)",
            "dense layer (dense_layers=1)",
        }
    with apply(pipe, RadialPattern()) as handle:
        sample()
        report = handle.report()
        layers = len(report.sites)
        assert report.sparse_calls == report.calls * 3 * (layers - 1) // (4 * layers)
        assert report.runs == 1
        with handle.options(enabled=False):
            assert torch.equal(sample(), stock)
    assert torch.equal(sample(), stock)
