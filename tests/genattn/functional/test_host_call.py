"""`genattn.attention` as a host calls it: its own (q, k, v, grid), text around the grid, a pattern in its own words."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern, TokenLayout
from genattn.geometry.token_layout import Segment
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import pattern_to_dict
from genattn.selection.rules import TopP
from genattn.selection.tiling import Clusters

GRID = (4, 5, 6)


def tensors(tokens: int, heads: int = 4, shared: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, h, dim, dtype=torch.float64) for h in (heads, shared, shared)]


def defined(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over what `seen` [B, S, S] shows, one head at a time; key head h // group serves head h."""
    group, factor = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    outs, sums = [], []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * factor
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse.clamp(min=-1e300)[..., None]).exp() @ v[:, :, head // group])
        sums.append(lse)
    return torch.stack(outs, 2), torch.stack(sums, 2)


def windows(grid: tuple[int, int, int], radius: int, before: int, after: int) -> torch.Tensor:
    """Tokens of the grid see those whose three coordinates differ by at most `radius` from the window's centre, the window
    moved inside at the borders; text sees and is seen by all. Bool [S, S], written without our geometry."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    inside = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis, length in enumerate(grid):
        centre = places[:, axis].clamp(min(radius, length - 1), max(length - 1 - radius, 0))
        low = (centre - radius).clamp(0, max(0, length - 2 * radius - 1))
        inside &= (places[None, :, axis] >= low[:, None]) & (places[None, :, axis] <= low[:, None] + 2 * radius)
    whole = torch.ones(before + len(places) + after, before + len(places) + after, dtype=torch.bool)
    whole[before : before + len(places), before : before + len(places)] = inside
    return whole


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.sampled_from([None, 0.3]), st.sampled_from([1, 2, 4]))
def test_text_masks_heads_scale(before: int, after: int, masked: bool, scale: float | None, shared: int) -> None:
    torch.manual_seed(before + 7 * after)
    tokens = before + 120 + after
    q, k, v = tensors(tokens, shared=shared)
    key_mask = torch.rand(2, tokens) > 0.3 if masked else None
    seen = windows(GRID, 1, before, after)[None].expand(2, -1, -1)
    if key_mask is not None:
        seen = seen & key_mask[:, None, :]
    want, want_lse = defined(q, k, v, seen, scale)
    call: dict[str, Any] = {"grid": GRID, "text_before": before, "text_after": after, "scale": scale, "key_mask": key_mask}
    out, lse = genattn.attention(q, k, v, NeighborhoodPattern((3, 3, 3)), return_lse=True, **call)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse, check_dtype=False)
    layout = TokenLayout.from_grid(GRID, text_before=before, text_after=after)
    same = genattn.attention(q, k, v, NeighborhoodPattern((3, 3, 3)), layout, scale=scale, key_mask=key_mask)
    assert torch.equal(same, genattn.attention(q, k, v, NeighborhoodPattern((3, 3, 3)), **call))


@pytest.mark.parametrize("grid", [(120,), (10, 12), GRID])
def test_one_to_three_axes_of_any_kind_of_whole_number(grid: tuple[int, ...]) -> None:
    q, k, v = tensors(120)
    pattern = NeighborhoodPattern((3,) * len(grid))
    want = genattn.attention(q, k, v, pattern, TokenLayout.from_grid(grid))
    assert torch.equal(genattn.attention(q, k, v, pattern, grid=torch.tensor(grid).numpy()), want)


def test_a_pattern_in_words_is_the_pattern() -> None:
    q, k, v = tensors(120)
    for pattern in (RadialPattern(decay=0.3), NeighborhoodPattern((3, 3, 3), tail="mean"), DensePattern()):
        want = genattn.attention(q, k, v, pattern, TokenLayout.from_grid(GRID))
        assert torch.equal(genattn.attention(q, k, v, pattern_to_dict(pattern), grid=GRID), want)
    radial = genattn.attention(q, k, v, RadialPattern(), grid=GRID)
    assert torch.equal(genattn.attention(q, k, v, "radial", grid=GRID), radial)


def test_names_take_effect_and_auto_is_dense_where_sparse_would_not_be_faster() -> None:
    q, k, v = tensors(4 * 8 * 8)
    dense = genattn.attention(q, k, v, DensePattern(), grid=(4, 8, 8))
    for name in ("radial", "gna", "adaptive"):
        assert not torch.allclose(genattn.attention(q, k, v, name, grid=(4, 8, 8)), dense), name
    torch.testing.assert_close(genattn.attention(q, k, v, "auto", grid=(4, 8, 8)), dense, rtol=0, atol=0)


@pytest.mark.parametrize("tail", [None, "mean", "mean2"])
def test_a_tail_beside_the_pattern(tail: str | None) -> None:
    q, k, v = tensors(120)
    pattern = NeighborhoodPattern((2, 2, 2), tail="mean2" if tail is None else None)
    want = genattn.attention(q, k, v, pattern.with_tail(tail), grid=GRID)
    assert torch.equal(genattn.attention(q, k, v, pattern, grid=GRID, tail=tail), want)
    assert not torch.equal(genattn.attention(q, k, v, pattern, grid=GRID), want)  # else `tail` had nothing to do


def test_the_measured_tail_is_the_seams() -> None:
    q, k, v = tensors(120)
    pattern = AdaptivePattern(TopP(0.5), tiles=Clusters(8, 24))
    assert pattern.measured_tail is not None
    want = genattn.attention(q, k, v, pattern.with_measured_tail(), grid=GRID)
    assert torch.equal(genattn.attention(q, k, v, pattern, grid=GRID, tail="measured"), want)
    assert not torch.equal(genattn.attention(q, k, v, pattern, grid=GRID), want)


def test_references_go_by_a_layout() -> None:
    layout = TokenLayout((Segment("text", (3,)), Segment("grid", (6, 7)), Segment("reference", (4, 4))))
    q, k, v = tensors(layout.seqlen)
    assert genattn.attention(q, k, v, NeighborhoodPattern(3), layout).shape == q.shape


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "either layout=.* or grid=.*, got neither"),
        ({"grid": GRID, "layout": TokenLayout.from_grid(GRID)}, "got both"),
        ({"layout": TokenLayout.from_grid(GRID), "text_after": 2}, "a layout has its text already, got 0 and 2"),
        ({"grid": (4, 5, 7)}, r"grid \(4, 5, 7\) with text_before=0 and text_after=0 has 140 tokens, the query has 120"),
        ({"grid": GRID, "text_before": -1}, "text_before must be a number of text tokens >= 0, got -1"),
        ({"grid": (4.0, 5, 6)}, "grid must be 1 to 3 whole numbers"),
        ({"grid": 120}, "grid must be 1 to 3 whole numbers"),
        ({"grid": (1, 4, 5, 6)}, "1 to 3 axes"),
        ({"layout": TokenLayout.from_grid((4, 5, 7))}, "with S = 140 for the layout"),
        ({"grid": GRID, "pattern": "sparse"}, "a pattern's name must be one of"),
        ({"grid": GRID, "pattern": {"type": "Windows"}}, "a pattern's type must be one of"),
        ({"grid": GRID, "pattern": 3}, "pattern must be a Pattern such as .*, got int: 3"),
        ({"grid": GRID, "tail": "median"}, "tail must be None or one of"),
        ({"grid": GRID, "impl": "cuda"}, "impl must be one of"),
        ({"grid": GRID, "key_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_mask must be bool"),
    ],
)
def test_refused(changes: dict[str, Any], match: str) -> None:
    q, k, v = tensors(120)
    with pytest.raises(GenAttnError, match=match):
        genattn.attention(q, k, v, **{"pattern": NeighborhoodPattern((3, 3, 3)), **changes})


def test_tensors_that_do_not_fit() -> None:
    q, k, v = tensors(120)
    with pytest.raises(GenAttnError, match=r"query must be \[B, S, H, D\], got \(2, 120, 4\)"):
        genattn.attention(q[..., 0], k, v, "radial", grid=GRID)
    with pytest.raises(GenAttnError, match="key heads must divide query heads"):
        genattn.attention(q[:, :, :3], k, v, "radial", grid=GRID)
