"""The formula against its float64 twin, and where it may not divide."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.guidance.nag.cut import Cut, pick, pick_mask
from genattn.guidance.nag.formula import Strength, guide, guide_reference


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1.0, 12.0),
    tau=st.floats(1.0, 4.0),
    alpha=st.floats(0.0, 1.0),
    gap=st.floats(0.0, 3.0),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(seed: int, scale: float, tau: float, alpha: float, gap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    negative = positive + gap * torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    strength = Strength(scale, tau, alpha)
    torch.testing.assert_close(guide(positive, negative, strength), guide_reference(positive, negative, strength))
    half = guide(positive.half(), negative.half(), strength)
    assert half.dtype == torch.float16


def test_the_norm_never_grows_beyond_tau() -> None:
    positive, negative = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 8)
    out = guide(positive, negative, Strength(20.0, 1.5, 1.0))
    growth = out.abs().sum((2, 3)) / positive.abs().sum((2, 3))
    torch.testing.assert_close(growth, torch.full_like(growth, 1.5))


def test_zeros_give_no_nan() -> None:
    zero, other = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    strength = Strength(3.0, 2.0, 0.5)
    for positive, negative in ((zero, zero), (zero, other), (other, zero), (other, 1.5 * other)):
        out = guide(positive, negative, strength)
        torch.testing.assert_close(out.double(), guide_reference(positive, negative, strength))
        assert torch.isfinite(out).all()


def test_norms_are_summed_where_heads_are_shared() -> None:
    positive, negative = torch.randn(1, 5, 4, 3), torch.randn(1, 5, 4, 3)
    strength = Strength(6.0, 1.2, 0.7)
    whole = guide(positive, negative, strength)
    pushed = torch.lerp(negative, positive, strength.scale)
    sums = {t.abs().sum((2, 3), keepdim=True)[:, :, :1].sum().item(): t for t in (pushed[:, :, :2], positive[:, :, :2])}
    other = dict(zip(sums, (pushed[:, :, 2:], positive[:, :, 2:])))

    def total(norms: torch.Tensor) -> torch.Tensor:
        rest = other[min(other, key=lambda value: abs(value - norms.sum().item()))]
        return norms + rest.abs().sum((2, 3), keepdim=True)

    part = guide(positive[:, :, :2], negative[:, :, :2], strength, total)
    torch.testing.assert_close(part, whole[:, :, :2])


@given(
    text=st.integers(0, 5),
    image=st.integers(1, 6),
    more=st.integers(1, 5),
    first=st.booleans(),
    end=st.booleans(),
    world=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_both_sequences_come_out_in_the_models_order(
    text: int, image: int, more: int, first: bool, end: bool, world: int
) -> None:
    pieces_stock, pieces_negative, pieces_carried = [], [], []
    at = text if first and not end else text + image
    for rank in range(world):
        t = [f"t{rank}.{i}" for i in range(text)]
        p = [f"p{rank}.{i}" for i in range(image)]
        n = [f"n{rank}.{i}" for i in range(more)]
        stock = [*t, *p] if first else [*p, *t]
        pieces_stock += stock
        pieces_negative += [*n, *p] if first else [*p, *n]
        pieces_carried += [*stock[:at], *n, *stock[at:]]
    cut = Cut(text + image, text, more, at, first)
    assert [pieces_carried[i] for i in cut.stock(world)] == pieces_stock
    assert [pieces_carried[i] for i in cut.negative(world)] == pieces_negative
    above, below = cut.image_rows(world)
    assert [pieces_stock[i] for i in above] == [pieces_negative[i] for i in below] == [x for x in pieces_stock if x[0] == "p"]
    assert [pieces_negative[i] for i in cut.negative_rows(world)] == [x for x in pieces_negative if x[0] == "n"]


@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 1, 9), (2, 1, 9, 9), (2, 3, 9, 9)])
def test_masks_follow(shape: tuple[int, ...]) -> None:
    mask, rows, columns = torch.rand(shape), torch.tensor([0, 2, 3]), torch.tensor([5, 6, 7, 8])
    found = pick_mask(mask, rows, columns, 9)
    expected = mask[..., columns]
    if len(shape) == 4 and shape[-2] == 9:
        expected = expected[..., rows, :]
    assert torch.equal(found, expected)
    assert pick_mask(None, rows, columns, 9) is None
    assert pick(mask, columns, mask.ndim - 1).untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
