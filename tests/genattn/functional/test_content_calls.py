"""Patterns that choose by content in a plain call of `attention`: they choose by the scores that count, and train."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from genattn import RadialPattern, TokenLayout, attention
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import PerHead, Union
from genattn.patterns.published import sol, sparge, svg2
from genattn.selection.rules import TopP

LAYOUT = TokenLayout.from_grid((4, 8, 8), text_after=5)
CHOOSING = {
    "top-k": AdaptivePattern("top-k"),
    "top-p": AdaptivePattern(TopP(0.8)),
    "error-aware": AdaptivePattern("error-aware", tail="mean"),
    "block top-k": BlockTopK(0.3),
    "sol": sol(variance="exact"),
    "sparge": sparge(0.8),
    "svg2": svg2(0.8, query_clusters=4, key_clusters=16),
    "union": Union(RadialPattern(decay=0.1), AdaptivePattern(TopP(0.8))),
    "per head": PerHead((AdaptivePattern(TopP(0.8)), RadialPattern())),
}


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("scale", [1.0, 0.05, -0.25])
def test_it_chooses_by_the_scale_of_the_call(name: str, scale: float) -> None:
    query, key, value = (2 * torch.randn(1, LAYOUT.seqlen, 2, 16) for _ in range(3))
    got = attention(query, key, value, CHOOSING[name], LAYOUT, scale=scale)
    same = attention(query * scale * 4, key, value, CHOOSING[name], LAYOUT)  # 16 ** -0.5 is a quarter
    torch.testing.assert_close(got, same, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["top-p", "sparge", "svg2", "union"])
def test_autocast_casts_the_inputs_and_not_the_choice(name: str) -> None:
    inputs = [torch.randn(1, LAYOUT.seqlen, 2, 16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(*inputs, CHOOSING[name], LAYOUT)
    assert torch.equal(got, attention(*(x.bfloat16() for x in inputs), CHOOSING[name], LAYOUT))


@pytest.mark.parametrize("name", CHOOSING)
def test_the_default_type_is_no_matter(name: str) -> None:
    layout = TokenLayout.from_grid((9, 8, 8))  # more places than bfloat16 can count
    inputs = [torch.randn(1, layout.seqlen, 2, 16) for _ in range(3)]
    expected = attention(*inputs, CHOOSING[name], layout)
    before = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(attention(*inputs, CHOOSING[name], layout), expected)
        finally:
            torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["top-k", "svg2", "union"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_checkpointing(name: str, reentrant: bool) -> None:
    inputs = [torch.randn(1, LAYOUT.seqlen, 2, 16, requires_grad=True) for _ in range(3)]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attention(*tensors, CHOOSING[name], LAYOUT)  # type: ignore[arg-type, assignment]
        return out.square().sum()

    want = torch.autograd.grad(call(*inputs), inputs)
    checkpoint(call, *inputs, use_reentrant=reentrant).backward()
    for tensor, expected in zip(inputs, want):
        torch.testing.assert_close(tensor.grad, expected)
