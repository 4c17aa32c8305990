"""Splits of the sequence that a plugin cannot follow are errors, before anything is computed; what does nothing may stay."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_wan

from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.adaptive import AdaptivePattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam import cores
from genattn.seam.cores import MARK
from genattn.seam.handle import apply
from genattn.seam.sparse_plugin import SparsePlugin


def parallel(**changes: Any) -> Any:
    config = {"ring_degree": 1, "ulysses_degree": 1, "ulysses_anything": False, **changes}
    return SimpleNamespace(context_parallel_config=SimpleNamespace(**config))


RING = parallel(ring_degree=2)
CONTENT = AdaptivePattern()
REFUSED = [
    (RING, CONTENT, "AdaptivePattern chooses tiles by all queries, of which a ring has some; use Ulysses"),
    (parallel(ulysses_degree=2, ring_degree=2), CONTENT, "of which a ring has some"),
    (RING, SparsePlugin(NeighborhoodPattern((3, 3, 3)), impl="halo"), "impl='halo' answers whole sequences; use impl='auto'"),
    (RING, EnhanceAVideo(), "it needs whole sequences and as many heads on every device; use plain Ulysses"),
    (parallel(ulysses_degree=2, ulysses_anything=True), EnhanceAVideo(), "use plain Ulysses"),
    (RING, SoftPAG("L0H0", target="mean_query"), "target='mean_query' asks with the mean of all queries"),
]


def forward(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**build_inputs("wan"), **more, return_dict=False)[0]
    return out


@pytest.mark.parametrize(("config", "plugin", "match"), REFUSED)
def test_apply_refuses_and_changes_nothing(config: Any, plugin: Any, match: str) -> None:
    model = build_model("wan")
    model._parallel_config = config
    with pytest.raises(GenAttnError, match=match):
        apply(model, plugin)
    assert not any(MARK in module.__dict__ for module in model.modules())
    apply(model, DensePattern()).remove()  # does nothing, so nothing can go wrong


def test_parallelism_that_came_after_apply_is_refused_at_the_next_forward() -> None:
    model = build_model("wan")
    stock = forward(model)
    with apply(model, CONTENT, dense_steps=0) as handle:
        model._parallel_config = RING
        with pytest.raises(
            GenAttnError, match="SparsePlugin on WanTransformer3DModel cannot act under ring context parallelism"
        ):
            forward(model)
        assert handle.report().calls == 0
        with handle.options(enabled=False):
            assert torch.equal(forward(model), stock)


def test_a_processor_with_a_config_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model knows of none, but a processor was told: refused at its call, while a dense pattern goes on to stock."""
    seen, core = [], transformer_wan.dispatch_attention_fn

    def spy(*args: Any, parallel_config: Any = None, **named: Any) -> torch.Tensor:
        seen.append(parallel_config)
        out: torch.Tensor = core(*args, **named)
        return out

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    model = build_model("wan")
    stock = forward(model)
    seen.clear()
    for block in model.blocks:
        block.attn1.processor._parallel_config = RING
    with apply(model, CONTENT, dense_steps=0), pytest.raises(GenAttnError, match="of which a ring has some"):
        forward(model)
    assert not seen
    with apply(model, DensePattern()) as handle:
        assert torch.equal(forward(model), stock)
        assert list(handle.report().dense_reasons) == ["every plugin leaves it to stock code"]
    assert seen.count(RING) == len(model.blocks)


def test_tensor_parallelism_leaves_sequences_whole() -> None:
    model = build_model("wan")
    model._parallel_config = SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object())
    with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
        forward(model)
        assert handle.report().sparse_calls == handle.report().calls > 0


def test_a_graph_names_a_config_by_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_PARALLEL", [None])
    configs = [parallel(ulysses_degree=2), parallel(ulysses_degree=2), parallel(ring_degree=2)]
    numbers = [cores._number_of(config) for config in configs]
    assert numbers == [1, 2, 3]
    assert [cores._PARALLEL[number] for number in numbers] == configs
    assert [cores._number_of(config) for config in configs] == numbers
    assert cores._number_of(None) == 0
