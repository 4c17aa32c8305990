"""From a processor's mask to a choice of keys; what cannot be reduced says why."""

import pytest
import torch
import torch.nn.functional as F

from genattn.functional.masks import grid_key_mask, key_mask

B, S = 2, 6
VALID = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
HIDE = torch.zeros(B, S).masked_fill(~VALID, -10000.0)


@pytest.mark.parametrize(
    "mask",
    [
        VALID,
        VALID[:, None, None],
        VALID[:, None, None].expand(B, 3, 1, S),
        HIDE,
        HIDE[:, None, None].masked_fill(~VALID[:, None, None], float("-inf")),
        VALID[:, None, None] & VALID[:, None, :, None],
        VALID[:, None, None] | ~VALID[:, None, :, None],  # padding rows may see anything
        torch.zeros(B, 1, S, S).masked_fill(~(VALID[:, None, None] & VALID[:, None, :, None]), -1e9),
    ],
)
def test_reduced_masks_give_the_same_attention_on_rows_that_count(mask: torch.Tensor) -> None:
    keys, why = key_mask(mask, B, S, S)
    assert why == ""
    assert keys is not None
    assert torch.equal(keys, VALID)
    q, k, v = torch.randn(3, B, 3, S, 4)
    given = mask if mask.ndim == 4 else mask[:, None, None]
    reference = F.scaled_dot_product_attention(q, k, v, given)
    out = F.scaled_dot_product_attention(q, k, v, keys[:, None, None])
    rows = VALID[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[rows], reference[rows])


def test_masks_that_hide_nothing_are_none() -> None:
    for mask in (None, torch.ones(B, S, dtype=torch.bool), torch.zeros(B, 1, 1, S), torch.ones(B, 1, S, S, dtype=torch.bool)):
        assert key_mask(mask, B, S, S) == (None, "")


def test_one_row_for_all_samples() -> None:
    keys, why = key_mask(VALID[:1, None, None], B, S, S)
    assert why == ""
    assert keys is not None
    assert torch.equal(keys, VALID[:1].expand(B, S))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(S, S).tril().bool()[None, None], "outer product"),
        (torch.randn(B, 1, 1, S), "additive bias"),
        (torch.randn(B, 1, S, S), "additive bias"),
        ((VALID[:, None, None] & VALID[:, None, :, None]).float(), "additive bias"),
        (torch.stack([VALID, ~VALID], 1)[:, :, None], "from head to head"),
        (torch.ones(B, S + 1, dtype=torch.bool), "7 columns for 6 keys"),
        (torch.ones(B, 3, S, S, dtype=torch.bool), "more than a choice of keys"),
        (torch.ones(S, S, dtype=torch.bool), "more than a choice of keys"),
        (object(), "is a object"),
    ],
)
def test_other_masks_are_told_apart(mask: object, reason: str) -> None:
    keys, why = key_mask(mask, B, S, S)
    assert keys is None
    assert reason in why


@pytest.mark.parametrize(
    ("value", "hides"), [(-1e3, True), (-9.99e2, False), (-1e4, True), (float("-inf"), True), (1.0, False)]
)
def test_which_numbers_hide(value: float, hides: bool) -> None:
    """From a thousand below zero on, a bias leaves no weight in any precision; anything nearer says how much."""
    row = torch.zeros(B, S).masked_fill(~VALID, value)
    square = torch.zeros(B, 1, S, S).masked_fill(~(VALID[:, None, None] & VALID[:, None, :, None]), value)
    for mask in (row, square):
        keys, why = key_mask(mask, B, S, S)
        assert (keys is not None) is hides
        assert ("additive bias" in why) is not hides
    shared = grid_key_mask(row[:, None, None].expand(B, 1, S, S), B, S, torch.arange(3))
    assert (shared is not None) is hides
    if hides:
        assert torch.equal(shared, VALID)
