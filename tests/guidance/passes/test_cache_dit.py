"""Beside cache-dit's way of caching, on a stand-in: extra passes keep their own state, and exchanged blocks are seen."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from genattn import DensePattern, GenAttnError, NeighborhoodPattern
from genattn.guidance.nag import NAG
from genattn.guidance.passes.block_swap import BlockOrder, Stand, swapped
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.denoiser import held_by_cache_dit, own_cache_dit_state, without_cache_dit
from genattn.seam.handle import apply


@dataclass
class State:
    """Of one run: forwards so far, and what the later blocks added, by half of the guidance."""

    name: str
    cache_config: Any
    forwards: int = 0
    added: dict[int, torch.Tensor] = field(default_factory=dict)


class Blocks(nn.Module):
    """Stands for all blocks: the first always runs; the others in the even steps, their sum is used again in the odd ones."""

    def __init__(self, blocks: nn.ModuleList, manager: Any) -> None:
        super().__init__()
        self.blocks, self.manager = blocks, manager

    def forward(self, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        state = self.manager._current_context = self.manager._cached_context_manager["blocks"]
        halves = 2 if state.cache_config.enable_separate_cfg else 1
        step, half = divmod(state.forwards, halves)
        state.forwards += 1
        hidden = self.blocks[0](hidden, *rest)
        if step % 2 and half in state.added:
            return hidden + state.added[half]
        out = hidden
        for block in self.blocks[1:]:
            out = block(out, *rest)
        state.added[half] = out - hidden
        return out


def enable(pipe: Any) -> Any:
    """On a Wan pipeline, as it is found there: own forward, own list of blocks, a state per run of the pipeline."""
    model = pipe.transformer
    manager = SimpleNamespace(_cached_context_manager={}, _current_context=None)
    held, under = Blocks(model.blocks, manager), model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(self, "blocks", nn.ModuleList([held])):
            return under(*args, **kwargs)

    model.forward = functools.partial(forward, model)
    model._original_forward, model._context_manager, model._context_names = under, manager, ["blocks"]
    return manager


def sample(pipe: Any, call: dict[str, Any], guidance: float = 6.0, manager: Any = None, **given: Any) -> torch.Tensor:
    if manager is not None:
        manager._cached_context_manager["blocks"] = State("blocks", SimpleNamespace(enable_separate_cfg=guidance > 1))
    call = {**call, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": guidance, **given}
    if guidance <= 1:
        call.pop("negative_prompt")
    out: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    return out


@pytest.fixture
def cached() -> tuple[Any, dict[str, Any], Any]:
    pipe, call = build_pipeline("wan")
    return pipe, call, enable(pipe)


def test_the_stand_in_caches(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, call, manager = cached
    assert not torch.equal(sample(pipe, call, manager=manager), sample(build_pipeline("wan")[0], call))
    assert manager._cached_context_manager["blocks"].forwards == 8


@pytest.mark.parametrize(
    "plugin",
    [lambda: DensePattern(), lambda: SoftPAG("L1H0", u=0.0, scale=2.0), lambda: SoftPAG("L0H1", u=0.0, scale=2.0)],
    ids=["dense", "softpag", "softpag, first block"],
)
def test_nothing_changes_at_zero_strength(plugin: Any, cached: tuple[Any, dict[str, Any], Any]) -> None:
    """An extra pass that counted as one of the pipeline's would swap the halves of the guidance."""
    pipe, call, manager = cached
    alone = sample(pipe, call, manager=manager)
    with apply(pipe, plugin()):
        assert torch.equal(sample(pipe, call, manager=manager), alone)
        assert manager._cached_context_manager["blocks"].forwards == 8
    assert torch.equal(sample(pipe, call, manager=manager), alone)


def test_guidance_acts_and_a_second_run_is_the_first(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, call, manager = cached
    alone = sample(pipe, call, manager=manager)
    for plugin in (SoftPAG("L1H0", u=1.0, scale=2.0), S2Guidance(ratio=0.5, scale=1.0, start=0.0, stop=1.0)):
        with apply(pipe, plugin):
            first = sample(pipe, call, manager=manager)
            assert not torch.allclose(first, alone, atol=1e-3)
    with apply(pipe, SoftPAG("L1H0", u=1.0, scale=2.0)):
        assert torch.equal(*(sample(pipe, call, manager=manager) for _ in range(2)))


def test_no_prefix_is_repeated_where_every_pass_decides_by_it(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, _, _ = cached
    with apply(pipe, DensePattern()) as handle:
        order = BlockOrder(pipe.transformer, handle.sites)
        assert "cache-dit is on the model" in str(order.why_no_reuse(2))
    plain = build_model("wan")
    with apply(plain, DensePattern()) as handle:
        assert BlockOrder(plain, handle.sites).why_no_reuse(2) is None


def test_a_block_that_never_ran_cannot_be_without_cache_dit() -> None:
    model = build_model("wan")
    with apply(model, DensePattern()) as handle:
        order = BlockOrder(model, handle.sites)
    with pytest.raises(GenAttnError, match="a block of blocks must have run in a guided step before one can be left out"):
        order.form_of(("blocks", 1), None)
    assert order.form_of(("blocks", 1), torch.ones(2, 3)).shape == (2, 3)
    assert order.form_of(("blocks", 2), None).device.type == "meta"
    assert order.form_of(("blocks", 2), (torch.ones(1), None))[1] is None


def test_a_negative_text_is_carried_through_the_blocks_that_it_holds(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, call, manager = cached
    alone = sample(pipe, call, 1.0, manager)
    with apply(pipe, NAG("red", alpha=0.0)):
        assert torch.equal(sample(pipe, call, 1.0, manager), alone)
    with apply(pipe, NAG("red", alpha=0.5, scale=4.0)) as handle:
        assert not torch.allclose(sample(pipe, call, 1.0, manager), alone, atol=1e-3)
        assert handle.report().to_dict()["plugins"][0]["counts"]["guided_calls"] == 3 + 1 + 3 + 1  # all blocks, the first, ...
        assert manager._cached_context_manager["blocks"].forwards == 4
    assert torch.equal(sample(pipe, call, 1.0, manager), alone)


def test_a_pattern_beside_it(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, call, manager = cached
    alone = sample(pipe, call, manager=manager)
    with apply(pipe, NeighborhoodPattern((2, 3, 3)), dense_steps=0, dense_layers=0) as handle:
        assert not torch.equal(sample(pipe, call, manager=manager), alone)
        assert handle.report().sparse_calls == 2 * (3 + 1 + 3 + 1)


def test_states_of_passes_are_apart_and_go_with_the_run(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe, _, manager = cached
    model, states = pipe.transformer, manager._cached_context_manager
    states["blocks"] = main = State("blocks", SimpleNamespace(enable_separate_cfg=True))
    states["another model's"] = other = object()
    manager._current_context = main
    seen = {}
    for name in ("cond+a", "cond+b", "cond+a"):
        with own_cache_dit_state(model, name):
            extra = states["blocks"]
            assert extra is not main
            assert seen.setdefault(name, extra) is extra
            assert not extra.cache_config.enable_separate_cfg
            assert states["another model's"] is other
            manager._current_context = extra
        assert (states["blocks"], manager._current_context) == (main, main)
    assert seen["cond+a"] is not seen["cond+b"]
    assert main.cache_config.enable_separate_cfg
    with contextlib.suppress(KeyError), own_cache_dit_state(model, "x"):
        raise KeyError
    assert states["blocks"] is main


def test_left_out_runs_every_block_with_the_hooks_of_offloading(cached: tuple[Any, dict[str, Any], Any]) -> None:
    pipe = cached[0]
    model, inputs, told = pipe.transformer, build_inputs("wan"), []
    plain = build_model("wan")(**inputs, return_dict=False)[0]
    model._hf_hook = SimpleNamespace(
        pre_forward=lambda module, *a, **k: told.append("in") or (a, k),
        post_forward=lambda module, out: told.append("out") or out,
    )
    with without_cache_dit(model):
        assert torch.equal(model(**inputs, return_dict=False)[0], plain)
    assert told == ["in", "out"]
    del model._hf_hook
    with without_cache_dit(model):
        assert torch.equal(model(**inputs, return_dict=False)[0], plain)
    assert isinstance(model.forward, functools.partial)


def test_a_model_without_it_is_left_alone() -> None:
    model = build_model("wan")
    assert not held_by_cache_dit(model)
    before = dict(model.__dict__)
    with own_cache_dit_state(model, "cond+x"), without_cache_dit(model):
        assert dict(model.__dict__) == before


def test_blocks_are_exchanged_in_their_list() -> None:
    """Whoever holds the list sees it, and finds it as it was."""
    model = build_model("wan")
    held, stock = model.blocks, list(model.blocks)

    @contextlib.contextmanager
    def put(number: int) -> Iterator[Stand]:
        stand = Stand(model.blocks[number])
        with swapped(model, {("blocks", number): stand}):
            yield stand

    with put(1) as first, put(1) as second:
        assert held is model.blocks
        assert held[1] is second
        assert second.__dict__["block"] is first
        assert [held[0], held[2]] == [stock[0], stock[2]]
    assert list(held) == stock
    with pytest.raises(RuntimeError), put(0):
        raise RuntimeError
    assert list(held) == stock
