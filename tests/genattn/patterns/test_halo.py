"""Haloed boxes: the same attention as the definition, with less work than fixed tiles where windows are not aligned."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from layout_draws import layouts
from neighborhood_draws import settings_for

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.halo_plan import halo_attention
from genattn.patterns.halo import halo_plan
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.planning.simulate import simulate


def _tensors(layout: TokenLayout, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    return [torch.randn(2, layout.seqlen, n, 8, dtype=torch.float64) for n in (heads, groups, groups)]


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    parts = [x.transpose(1, 2) for x in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@given(st.data(), layouts(), st.sampled_from([1, 4, 9, 16]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_is_attention_under_the_mask(data: st.DataObject, layout: TokenLayout, block: int) -> None:
    pattern = data.draw(settings_for(layout))
    if any(axis.circular for axis in pattern.axes(layout)):
        return
    plan = halo_plan(pattern, layout, block)
    tensors = _tensors(layout)
    assert torch.allclose(halo_attention(*tensors, plan), _dense(*tensors, pattern.mask(layout)), atol=1e-12)
    mask = pattern.mask(layout)
    answered = torch.zeros(layout.seqlen, dtype=torch.int64)
    for parts, seen in plan.kinds():
        for place in itertools.product(*(range(len(part.rows)) for part in parts)):
            tile, box = (
                plan.tokens([getattr(part, name)[i : i + 1] for part, i in zip(parts, place)])[0] for name in ("rows", "keys")
            )
            answered[tile] += 1
            want = mask[tile][:, torch.cat([plan.shared_keys, box])]
            assert torch.equal(want, torch.ones_like(want) if seen is None else seen)
            assert want.any(0).all(), "a key that no query of the tile sees"
    assert torch.equal(answered == 1, layout.raster_index >= 0)


def test_gradients_and_key_masks() -> None:
    layout = TokenLayout((Segment("text", (3,)), Segment("grid", (3, 4, 5)), Segment("padding", (2,))))
    pattern = NeighborhoodPattern((2, 3, 3), stride=(1, 2, 1))
    plan, mask = halo_plan(pattern, layout, 8), pattern.mask(layout)
    hidden = torch.ones(2, layout.seqlen, dtype=torch.bool)
    hidden[1, 1:3] = False
    ours, theirs = ([x.clone().requires_grad_() for x in _tensors(layout)] for _ in range(2))
    for a, b in zip(ours, theirs):
        a.data = b.data.clone()
    out = halo_attention(*ours, plan, scale=0.3, key_mask=hidden)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs), attn_mask=mask & hidden[:, None, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-12)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(
    ("grid", "window", "stride", "fewer"),
    [((30, 48, 80), (18, 24, 24), 1, 1.2), ((21, 30, 52), (10, 16, 24), (2, 8, 8), 1.1), ((64, 64), (20, 20), 1, 1.3)],
)
def test_less_work_than_fixed_tiles(grid: tuple[int, ...], window: tuple[int, ...], stride: object, fewer: float) -> None:
    layout, pattern = TokenLayout.from_grid(grid), NeighborhoodPattern(window, stride)  # type: ignore[arg-type]
    plan = halo_plan(pattern, layout)
    assert pattern.plan(layout).computed_density > fewer * plan.computed_density
    simulated = simulate(grid, window, stride, tile_q=(1, 8, 16) if len(grid) == 2 else (2, 8, 8), halo=True)  # type: ignore[arg-type]
    assert plan.computed_density < 1.1 / simulated.total_work


def test_refusals() -> None:
    layout = TokenLayout.from_grid((4, 6))
    with pytest.raises(GenAttnError, match="wrap around"):
        halo_plan(NeighborhoodPattern(3, circular=(False, True)), layout)
    with pytest.raises(GenAttnError, match="needs a grid"):
        halo_plan(NeighborhoodPattern(3), TokenLayout((Segment("text", (4,)),)))
    with pytest.raises(ValueError, match=r"\[B, 24, H, D\]"):
        halo_attention(*(torch.zeros(1, 23, 1, 4) for _ in range(3)), halo_plan(NeighborhoodPattern(3), layout))
