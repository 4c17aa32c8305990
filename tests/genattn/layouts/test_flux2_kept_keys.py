"""FLUX.2 with kept keys (Klein KV): references are read in the first step and stand as keys alone in the others.

In both kinds of step text and image ask of everything, and that call is sparse; a reference asks of the references alone, once,
and that call stays dense because references are exact.
"""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers import transformer_flux2

from genattn import DensePattern, NeighborhoodPattern
from genattn.geometry.token_layout import TokenLayout
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.pipelines.tiny.random.images_by_ids import image_ids
from genattn.seam.handle import apply

GRID, REFERENCES, WORDS = (8, 12), ((4, 6), (5, 3)), 10
KEPT = sum(height * width for height, width in REFERENCES)
PATTERN, NOW = NeighborhoodPattern(3, tail=None), {"dense_steps": 0, "dense_layers": 0}
Inputs = dict[str, Any]


def two_steps() -> tuple[torch.nn.Module, Inputs, Callable[[Any], Inputs]]:
    """(model, inputs of the step that keeps the keys of two references, those of the next by what the first one kept)."""
    model, inputs = build_model("flux2-kv"), build_inputs("flux2-kv", grid=GRID)
    image = {name: inputs[name][:, -GRID[0] * GRID[1] :] for name in ("hidden_states", "img_ids")}
    ids = [image_ids(shape, columns=4, reference=10 * at)[None] for at, shape in enumerate(REFERENCES, 1)]
    drawn = torch.randn(1, KEPT, image["hidden_states"].shape[2], generator=torch.Generator().manual_seed(1))
    inputs["hidden_states"] = torch.cat([drawn, image["hidden_states"]], dim=1)
    inputs["img_ids"] = torch.cat([*ids, image["img_ids"]], dim=1)
    inputs["num_ref_tokens"] = KEPT
    later = {**inputs, **image, "kv_cache_mode": "cached"}
    del later["num_ref_tokens"]
    return model, inputs, lambda kept: {**later, "kv_cache": kept}


def both(model: Any, inputs: Inputs, later: Callable[[Any], Inputs]) -> list[torch.Tensor]:
    """Answers of the step that keeps and of the one that has."""
    with torch.no_grad():
        out, kept = model(**copy.deepcopy(inputs), return_dict=False)
        return [out, model(**later(kept), return_dict=False)[0]]


def under_the_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Dense attention; rows of text and image under the pattern's own mask over text, references, image."""
    before, tokens = WORDS, WORDS + KEPT + GRID[0] * GRID[1]
    mask = None
    if k.shape[1] == tokens:
        layout = TokenLayout.from_grid(GRID, text_before=before + KEPT)  # references are looked at as text is
        mask = PATTERN.mask(layout)
        mask = torch.cat([mask[:before], mask[before + KEPT :]])
    else:
        assert q.shape[1] == k.shape[1] == KEPT
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def test_dense_is_stock_in_both_steps() -> None:
    model, *steps = two_steps()
    stock = both(model, *steps)
    with apply(model, DensePattern()) as handle:
        found = both(model, *steps)
        assert handle.report().calls > 0
    again = both(model, *steps)
    for out in (found, again):
        assert all(torch.equal(a, b) for a, b in zip(out, stock, strict=True))


def test_sparse_is_the_mask_over_text_references_and_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *steps = two_steps()
    stock = both(model, *steps)
    with apply(model, PATTERN, **NOW) as handle:
        found = both(model, *steps)
        report = handle.report()
    sites = len(report.sites)
    assert report.sparse_calls == 2 * sites
    assert report.calls == 3 * sites  # and the references among themselves, once
    assert len(report.dense_reasons) == 1
    (reason,) = report.dense_reasons
    assert "no layout" not in reason
    monkeypatch.setattr(transformer_flux2, "dispatch_attention_fn", under_the_mask)
    for got, want, dense in zip(found, both(model, *steps), stock, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert (got - dense).abs().max() > 1e-4


def klein(model: torch.nn.Module) -> Any:
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein_kv")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=16,
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe = pipeline.Flux2KleinKVPipeline(transformer=model, vae=vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any) -> torch.Tensor:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pictures = [Image.new("RGB", (64, 72), color) for color in ("red", "blue")]
    words = torch.randn(1, WORDS, 32, generator=generator)
    settings = {"image": pictures, "prompt_embeds": words, "height": 64, "width": 96, "num_inference_steps": 3}
    out: torch.Tensor = pipe(**settings, output_type="pt", generator=generator)[0]
    return out


def test_the_whole_pipeline() -> None:
    """Three steps, the first of them with the references: sparse in each, and stock again after removal."""
    pipe = klein(build_model("flux2-kv", guidance_embeds=False))
    stock = sampled(pipe)
    with apply(pipe, DensePattern()):
        assert torch.equal(sampled(pipe), stock)
    with apply(pipe, PATTERN, **NOW) as handle:
        assert not torch.equal(sampled(pipe), stock)
        report = handle.report()
        assert report.sparse_calls == 3 * len(report.sites)
        assert report.calls - report.sparse_calls == len(report.sites)
    assert torch.equal(sampled(pipe), stock)
