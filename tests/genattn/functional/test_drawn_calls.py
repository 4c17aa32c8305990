"""Thousands of drawn calls against the float64 definition: pattern, layout, type, strides, key mask, heads, scale, backend."""

import random
from typing import Any

import pytest
import torch

from genattn import attention
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.combine import Intersection, PerHead, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

BOUNDS = {torch.float32: 5e-6, torch.float64: 1e-11, torch.float16: 3e-3, torch.bfloat16: 2e-2}
IMPLS = ("auto", "cpu", "grouped", "reference", "sdpa")


def _layout(draw: random.Random) -> TokenLayout:
    parts = [Segment("grid", tuple(draw.randint(1, 6) for _ in range(3)))]
    for kind in ("text", "register", "reference", "padding"):
        if draw.random() < 0.4:
            parts.insert(draw.randint(0, len(parts)), Segment(kind, (draw.randint(1, 7),)))
    return TokenLayout(tuple(parts))


def _single(draw: random.Random, layout: TokenLayout) -> Pattern:
    kind = draw.randrange(4)
    if kind == 0:
        return DensePattern()
    if kind == 1:
        return RadialPattern(
            decay=draw.choice([0.05, 0.3, 1.0]), variant=draw.choice(["paper", "genattn"]), block=draw.choice([None, 2])
        )
    window = [draw.choice([-1, *range(1, size + 1)]) for size in layout.grid or ()]
    stride = [draw.randint(1, max(1, w)) for w in window]
    return NeighborhoodPattern(window, stride=stride, is_causal=draw.random() < 0.2)


def _pattern(draw: random.Random, layout: TokenLayout, heads: int) -> Pattern:
    one = _single(draw, layout)
    how = draw.randrange(5)
    if how == 0:
        return Union(one, _single(draw, layout))
    if how == 1:
        return Intersection(one, _single(draw, layout))
    if how == 2:
        return PerHead((one, _single(draw, layout)), tuple(draw.randrange(2) for _ in range(heads)))
    return GlobalTokens(one, frames=(0,)) if how == 3 else one


def _strided(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `shape` [B, S, H, D], often a view of a larger or a permuted one."""
    b, s, h, d = shape
    how = draw.randrange(4)
    if how == 0:
        return torch.randn(shape).to(dtype)
    if how == 1:
        return torch.randn(b, h, s, d).to(dtype).transpose(1, 2)
    if how == 2:
        return torch.randn(b, s, 3 * h * d).to(dtype)[..., h * d : 2 * h * d].unflatten(-1, (h, d))
    return torch.randn(b, s, h, 2 * d).to(dtype)[..., ::2]


def _expected(q: Any, k: Any, v: Any, mask: torch.Tensor, key_mask: Any, scale: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over what `mask` [N, S, S] shows, in float64, row by row; zeros and -inf where nothing is seen."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    seen = mask.expand(q.shape[1], *mask.shape[-2:])[None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return (weights @ v).transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_drawn_calls(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for turn in range(100):
        layout = _layout(draw)
        heads = draw.choice([1, 2, 4])
        shared = draw.choice([h for h in (1, 2, 4) if heads % h == 0])
        pattern = _pattern(draw, layout, heads)
        dtype, impl = draw.choice(list(BOUNDS)), draw.choice(IMPLS)
        if impl == "cpu" and dtype == torch.float64:
            impl = "grouped"  # the C++ kernel multiplies floats
        batch, dim = draw.choice([1, 2]), draw.choice([1, 4, 16, 24])
        query = _strided(draw, (batch, layout.seqlen, heads, dim), dtype)
        key, value = (_strided(draw, (batch, layout.seqlen, shared, dim), dtype) for _ in range(2))
        key_mask = torch.rand(batch, layout.seqlen) < draw.choice([0.1, 0.7]) if draw.random() < 0.4 else None
        scale = draw.choice([None, 0.1, 1.0])
        mask = pattern.mask(layout)
        with torch.set_grad_enabled(draw.random() < 0.5):
            # SDPA returns no log-sum-exp, and says so where it is asked
            with_lse = "auto" if impl == "sdpa" else impl
            out, lse = attention(query, key, value, pattern, layout, with_lse, True, scale, key_mask)
            alone = attention(query, key, value, pattern, layout, impl, False, scale, key_mask)
        want, want_lse = _expected(query, key, value, mask, key_mask, scale)
        told = f"seed {seed}, turn {turn}: {pattern} on {layout.describe()}, {impl}, {dtype}, heads {heads}/{shared}"
        real = layout.raster_index != -2  # what padding asks is nobody's concern
        bound = BOUNDS[dtype] * max(1.0, float(want.abs().max()))
        for got in (out, alone):
            assert not got.isnan().any(), told
            assert float((got.double() - want)[:, real].abs().max()) <= bound * 4, told
        assert torch.equal(lse[:, real].isneginf(), want_lse[:, real].isneginf()), told
