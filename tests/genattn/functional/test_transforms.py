"""Under torch.func a call of `attention` gives what autograd and a loop give, and leaves nothing of the transform behind."""

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap

import genattn
from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern, TokenLayout, attention
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.pattern import Pattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model

STATIC: dict[str, Pattern] = {
    "radial": RadialPattern(),
    "neighborhood with a tail": NeighborhoodPattern((1, 3, 3), tail="mean"),
    "dense": DensePattern(),
}
CHOOSING: dict[str, Pattern] = {
    "adaptive": AdaptivePattern(),
    "clusters": AdaptivePattern(tiles="clusters"),
    "top-k": BlockTopK(0.3),
}
EVERY = {**STATIC, **CHOOSING}


def _drawn(*batch: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(*batch, 1, 3 * 16 + 2, 2, 8, generator=draw) for _ in range(3)]


@pytest.mark.parametrize("name", EVERY)
def test_grad_is_that_of_autograd(name: str) -> None:
    """Also where the plan is made inside, and used by an ordinary call afterwards."""
    text = len(name)  # a layout that no other test has made a plan for
    layout = TokenLayout.from_grid((3, 4, 4), text_after=2, text_before=text)
    inputs = [torch.cat([x, torch.randn(1, text, 2, 8)], 1) for x in _drawn()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return attention(*tensors, EVERY[name], layout).square().sum()  # type: ignore[arg-type, union-attr]

    found = grad(loss, argnums=(0, 1, 2))(*inputs)
    wanting = [x.clone().requires_grad_() for x in inputs]
    loss(*wanting).backward()
    for one, other in zip(found, wanting, strict=True):
        torch.testing.assert_close(one, other.grad)
    second = grad(lambda q: grad(loss)(q, *inputs[1:]).square().sum())(inputs[0])
    assert second.isfinite().all()


@pytest.mark.parametrize("name", STATIC)
def test_vmap_is_a_loop(name: str) -> None:
    layout = TokenLayout.from_grid((3, 4, 4), text_after=2)
    inputs = _drawn(4)

    def call(*tensors: torch.Tensor) -> Any:
        return attention(*tensors, STATIC[name], layout)  # type: ignore[arg-type]

    torch.testing.assert_close(vmap(call)(*inputs), torch.stack([call(*each) for each in zip(*inputs)]))
    each = vmap(grad(lambda q, k, v: call(q, k, v).square().sum()))(*inputs)
    assert each.shape == inputs[0].shape


@pytest.mark.parametrize("name", CHOOSING)
def test_a_choice_needs_to_see_the_entries(name: str) -> None:
    layout = TokenLayout.from_grid((3, 4, 4), text_after=2)
    with pytest.raises(GenAttnError, match="which torch.vmap hides; give the entries as a batch"):
        vmap(lambda q, k, v: attention(q, k, v, CHOOSING[name], layout))(*_drawn(4))


@pytest.mark.parametrize("impl", ["cpu", "grouped", "sdpa"])
def test_a_named_kernel_says_why_not(impl: str) -> None:
    layout = TokenLayout.from_grid((3, 4, 4), text_after=2)
    query, key, value = _drawn()
    with pytest.raises(GenAttnError, match="torch.func transforms .* see into no kernel"):
        grad(lambda q: attention(q, key, value, RadialPattern(), layout, impl=impl).sum())(query)  # type: ignore[union-attr]
    attention(query, key, value, RadialPattern(), layout, impl=impl)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # stock attention under vmap
@pytest.mark.parametrize("family", ["wan", "sd3", "unet"])
def test_models_with_a_pattern_on_them(family: str) -> None:
    """`functional_call` and `grad` over the weights, `vmap` over latents: as autograd and a loop."""
    model, inputs = build_model(family), build_inputs(family)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    latents = "sample" if family == "unet" else "hidden_states"

    def call(x: torch.Tensor) -> Any:
        return model(**{**inputs, latents: x}, return_dict=False)[0]

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        out = functional_call(model, given, (), {**inputs, "return_dict": False})[0]
        return out.square().mean()  # type: ignore[no-any-return]

    with genattn.apply(model, AdaptivePattern(), dense_steps=0, dense_layers=0) as handle:
        found = grad(loss)(weights)
        assert handle.report().sparse_calls
        wanting = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        wanted = torch.autograd.grad(loss(wanting), list(wanting.values()), allow_unused=True)
    for one, other in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)
    with genattn.apply(model, NeighborhoodPattern((3, 3, 3) if family == "wan" else (3, 3)), dense_steps=0, dense_layers=0):
        some = torch.stack([inputs[latents], 0.5 * inputs[latents]])
        with torch.no_grad():
            torch.testing.assert_close(vmap(call)(some), torch.stack([call(x) for x in some]), atol=1e-4, rtol=1e-4)
