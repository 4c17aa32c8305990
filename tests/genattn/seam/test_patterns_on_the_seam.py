"""Patterns that differ by layer, or look at the tensors, reach the attention of a stock model."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import genattn
from genattn.errors import GenAttnError
from genattn.functional.memories import Memories
from genattn.functional.planned import plan_for, tile_size
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.report import Report
from genattn.selection.rules import TopK
from genattn.selection.tiling import Clusters

WIDE = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 1, "output_type": "latent"}


def _run(pattern: genattn.Pattern) -> tuple[torch.Tensor, Report]:
    pipe, call = build_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    with genattn.apply(pipe, pattern, dense_steps=0, dense_layers=0) as handle:
        out = pipe(**{**call, **WIDE, "generator": torch.Generator().manual_seed(0)}).frames
        return out, handle.report()


def test_each_layer_gets_its_own_decay() -> None:
    layered = genattn.RadialPattern(layer_decay=(0.1, 0.1, 100.0))
    _, report = _run(layered)
    densities = {row["depth"]: row["density"] for row in report.sites if row["sparse"]}
    layout = genattn.TokenLayout.from_grid((5, 8, 8))
    block = tile_size(layout.seqlen, "cpu")
    for depth, decay in enumerate((0.1, 0.1, 100.0)):
        assert densities[depth] == pytest.approx(genattn.RadialPattern(decay=decay).plan(layout, block, block).density)
    assert densities[0] < densities[2]


def test_a_layer_list_that_does_not_fit_is_refused_before_anything_changes() -> None:
    pipe, _ = build_pipeline("wan")
    before = {name: type(p) for name, p in pipe.transformer.attn_processors.items()}
    with pytest.raises(GenAttnError, match="one value per layer, got 2 values for layer 0 of 3"):
        genattn.apply(pipe, genattn.RadialPattern(layer_decay=(1.0, 1.0)))
    assert {name: type(p) for name, p in pipe.transformer.attn_processors.items()} == before


def test_a_content_adaptive_pattern_runs() -> None:
    _, report = _run(BlockTopK(keep=0.25))
    assert report.sparse_calls == report.calls > 0
    assert 0.25 <= report.density < 0.6
    kept, _ = _run(BlockTopK(keep=1.0))
    dense, _ = _run(genattn.DensePattern())
    assert torch.allclose(kept, dense, atol=1e-4)


def test_tiles_shrink_with_the_sequence() -> None:
    assert [tile_size(n, "cpu") for n in (1, 40, 512, 1024, 2048, 4096, 10**6)] == [16, 16, 16, 32, 64, 128, 128]
    assert [tile_size(n, "cuda") for n in (1, 4096)] == [64, 128]
    layout = genattn.TokenLayout.from_grid((8, 8, 8))
    query = torch.zeros(1, layout.seqlen, 1, 8)
    assert plan_for(query, query, genattn.RadialPattern(), layout).block_q == 16


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("pattern", [BlockTopK(keep=0.3), AdaptivePattern(tiles="clusters", refresh_every=2)])
def test_what_a_sample_chooses_is_no_matter_of_its_neighbours(family: str, pattern: genattn.Pattern) -> None:
    pipe, call = build_pipeline(family)
    settings = {**call, **WIDE, "num_inference_steps": 2}
    settings.pop("prompt")

    def run(*samples: int) -> torch.Tensor:
        settings["generator"] = [torch.Generator().manual_seed(sample) for sample in samples]
        out: torch.Tensor = pipe(prompt=[("a cat", "a dog on a hill")[n] for n in samples], **settings).frames
        return out

    stock = run(0, 1)
    with genattn.apply(pipe, pattern, dense_steps=0, dense_layers=0) as handle:
        both = run(0, 1)
        alone = torch.cat([run(0), run(1)])
        assert handle.report().sparse_calls == handle.report().calls > 0
    effect = float((both - stock).abs().max())
    assert effect > 0
    assert float((both - alone).abs().max()) <= 1e-3 * effect


def _two_pipes(family: str) -> tuple[list[Any], dict[str, Any]]:
    """Two pipelines on one denoiser, all else their own, and a call without a prompt."""
    pipe, call = build_pipeline(family)
    parts = {name: part if isinstance(part, torch.nn.Module) else copy.deepcopy(part) for name, part in pipe.components.items()}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    call.pop("prompt")
    return [pipe, other], {**call, **WIDE, "num_inference_steps": 3}


@pytest.mark.parametrize(
    "pattern",
    [
        AdaptivePattern(TopK(0.3), refresh_every=3),
        AdaptivePattern(TopK(0.3), share_passes=True),
        AdaptivePattern(TopK(0.3), tiles=Clusters(4, 8)),
    ],
    ids=["kept over steps", "shared by passes", "clusters"],
)
def test_a_run_inside_of_anothers_chooses_for_itself(pattern: genattn.Pattern) -> None:
    pipes, call = _two_pipes("wan")

    def run(which: int, inside: list[torch.Tensor] | None = None) -> torch.Tensor:
        def between(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if step == 0 and inside is not None:
                inside.append(run(1))
            return {}

        given = {"prompt": ("a cat", "a dog on a hill")[which], "generator": torch.Generator().manual_seed(which)}
        return pipes[which](**given, callback_on_step_end=between, **call).frames  # type: ignore[no-any-return]

    with genattn.apply(pipes[0], pattern, dense_steps=0, dense_layers=0):
        alone, inside = [run(0), run(1)], []
        assert torch.equal(run(0, inside), alone[0])
        assert torch.equal(inside[0], alone[1])


def test_what_a_run_chose_goes_with_its_pipeline() -> None:
    memories, gone = Memories(), DiffusionPipeline()
    memories.at(gone, "site").kept["plan"] = kept = _Plan()
    memories.at(None, "site").kept["plan"] = 1
    memories.forget(None)
    assert memories.at(None, "site").kept == {}
    assert memories.at(gone, "site").kept == {"plan": kept}
    left = weakref.ref(kept)
    del kept, gone
    gc.collect()
    assert left() is None


class _Plan:
    """Something that can be looked at from afar."""


@pytest.mark.parametrize("pattern", [AdaptivePattern(refresh_every=2), AdaptivePattern(tiles=Clusters(4, 8, 2, 1))])
def test_blocks_computed_again_choose_as_they_did(pattern: genattn.Pattern) -> None:
    def gradient(again: bool) -> torch.Tensor:
        model, inputs = build_model("wan"), build_inputs("wan", grid=(4, 8, 8))
        if again:
            model.enable_gradient_checkpointing()
        model.train()
        found = start = inputs["hidden_states"].clone().requires_grad_(True)
        with genattn.apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
            for timestep in (900.0, 500.0, 100.0):  # the gradient goes through a run of three steps
                given = {**inputs, "hidden_states": found, "timestep": torch.tensor([timestep])}
                found = found - 0.3 * model(**given).sample
            found.square().mean().backward()
            assert handle.report().sparse_calls > 0
        assert start.grad is not None
        return start.grad

    plain = gradient(False)
    assert float((gradient(True) - plain).norm()) <= 1e-5 * float(plain.norm())
