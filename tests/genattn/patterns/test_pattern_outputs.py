"""Every pattern through `genattn.attention`: the plan and its rule give the attention of the mask, on each CPU path."""

import pytest
import torch

import genattn
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

RAGGED = TokenLayout((Segment("text", (9,)), Segment("grid", (6, 7, 9)), Segment("padding", (5,))))
CUT = TokenLayout(
    (Segment("text", (4,)), Segment("grid", (6, 7, 9), 0, 200), Segment("text", (4,)), Segment("grid", (6, 7, 9), 200, 378))
)
PATTERNS: list[Pattern] = [
    RadialPattern(),
    RadialPattern(window="box", block=8),
    RadialPattern(variant="paper"),
    RadialPattern(variant="official", block=16),
    RadialPattern(decay=(0.1, 0.2, 0.5, 1.0), block=8),
    NeighborhoodPattern((3, 5, 5)),
    NeighborhoodPattern(3, dilation=2),
    NeighborhoodPattern((3, 3, 3), dilation=(1, 1, 3), circular=(False, False, True)),
    NeighborhoodPattern((4, 3, 4), is_causal=(True, False, False), tile="runs"),
    Union(RadialPattern(variant="paper"), NeighborhoodPattern(3)),
    Intersection(RadialPattern(variant="paper"), NeighborhoodPattern((5, 5, 5))),
    PerHead((RadialPattern(block=8), NeighborhoodPattern(3)), (0, 1, 1, 0)),
    GlobalTokens(NeighborhoodPattern(3), frames=(0,)),
    GlobalTokens(RadialPattern(variant="official", block=16), every=(2, 4, 4)),
]


@pytest.mark.parametrize("layout", [RAGGED, CUT], ids=["ragged", "cut"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: str(p)[:60])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_attention_under_the_pattern_is_attention_under_its_mask(pattern: Pattern, layout: TokenLayout, impl: str) -> None:
    query, key, value = torch.randn(3, 2, layout.seqlen, 4, 16)
    mask = pattern.mask(layout)
    mask = (mask if mask.ndim == 3 else mask[None]).expand(4, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    ).transpose(1, 2)
    out = genattn.attention(query, key, value, pattern, layout, impl=impl)
    assert torch.allclose(out, expected, atol=3e-6)


def test_a_selector_that_keeps_all_is_dense() -> None:
    query, key, value = torch.randn(3, 1, RAGGED.seqlen, 2, 8)
    ours = genattn.attention(query, key, value, BlockTopK(keep=1.0), RAGGED)
    assert torch.allclose(ours, genattn.attention(query, key, value, DensePattern(), RAGGED), atol=2e-6)
