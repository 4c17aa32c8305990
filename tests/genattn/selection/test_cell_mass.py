"""Exact mass and loss per cell, and the errors of skipping, against the whole attention in float64."""

import math

import pytest
import torch

from genattn.selection.cell_mass import cell_mass, sampled, share_errors

B, S, H, G, D = 2, 26, 4, 2, 5
CELLS = torch.tensor([[2, 3, 4, 5, 6, 7], [8, 9, 10, 11, -1, -1], [12, 13, 14, 15, 16, 17], [18, 19, 20, -1, -1, -1]])


def _drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(B, S, H, D, generator=draw)
    k, v = (torch.randn(B, S, G, D, generator=draw) for _ in range(2))
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, [3, 9, 22]] = False
    return q, k, v, mask


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keys = k.double().repeat_interleave(H // G, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) / math.sqrt(D)
    return scores.masked_fill(~mask[:, None, None], -math.inf)


def test_mass_and_loss() -> None:
    q, k, _, mask = _drawn()
    mass, loss = cell_mass(q, k, CELLS, key_mask=mask, samples=6)
    scores = _scores(q, k, mask)
    prob = scores.softmax(-1)
    for i, rows in enumerate(CELLS):
        mine = rows[rows >= 0]
        picked = sampled(CELLS, 6)[i]
        assert set(picked.tolist()) <= set(mine.tolist())
        for j, lanes in enumerate(CELLS):
            there = lanes[lanes >= 0]
            want_mass = torch.zeros(H, dtype=torch.float64)
            want_loss = torch.zeros(H, dtype=torch.float64)
            for b in range(B):
                seen = there[mask[b, there]]
                given = prob[b][:, picked][:, :, seen].sum(-1)
                spread = scores[b][:, picked][:, :, seen].var(-1, unbiased=False).sqrt()
                want_mass += given.mean(1) / B
                want_loss += (given * spread).mean(1) / B
            assert torch.allclose(mass[:, i, j], want_mass, atol=1e-6)
            assert torch.allclose(loss[:, i, j], want_loss, atol=1e-6)


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v, mask = _drawn()
    kept = torch.eye(4, dtype=torch.bool).expand(1, H, -1, -1)
    wanted = *cell_mass(q, k, CELLS, key_mask=mask), *share_errors(q, k, v, CELLS, kept, True, key_mask=mask)
    for x in (k, v):
        x[~mask] = math.nan
    found = *cell_mass(q, k, CELLS, key_mask=mask), *share_errors(q, k, v, CELLS, kept, True, key_mask=mask)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_samples_are_spread_over_the_cell() -> None:
    assert sampled(CELLS, 2)[0].tolist() == [3, 6]
    assert sampled(CELLS, 99).shape == (4, 6)
    assert cell_mass(*_drawn()[:2], CELLS, samples=1)[0].shape == (H, 4, 4)


@pytest.mark.parametrize("tail", [False, True])
def test_errors_of_skipping(tail: bool) -> None:
    q, k, v, mask = _drawn()
    kept = torch.rand(3, H, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    kept[0] = True
    error, power = share_errors(q, k, v, CELLS, kept, tail, key_mask=mask, samples=6)
    assert torch.allclose(error[0], torch.zeros(H, dtype=torch.float64), atol=1e-9)
    scores, values = _scores(q, k, mask), v.double().repeat_interleave(H // G, dim=2).transpose(1, 2)
    keys = k.double().repeat_interleave(H // G, dim=2).transpose(1, 2)
    dense = scores.softmax(-1) @ values
    picked = sampled(CELLS, 6)
    assert torch.allclose(power, sum(dense[:, :, rows].square().sum((0, 2, 3)) for rows in picked), rtol=1e-5)  # type: ignore[arg-type]
    for choice in (1, 2):
        wanted = torch.zeros(H, dtype=torch.float64)
        for b in range(B):
            for h in range(H):
                for i, rows in enumerate(picked):
                    hidden = torch.zeros(S, dtype=torch.bool)
                    more_s, more_v = [], []
                    for j, lanes in enumerate(CELLS):
                        there = lanes[lanes >= 0]
                        if kept[choice, h, i, j]:
                            continue
                        hidden[there] = True
                        there = there[mask[b, there]]
                        if tail:
                            mean = keys[b, h, there].mean(0)
                            more_s.append(q[b, rows, h].double() @ mean / math.sqrt(D) + math.log(len(there)))
                            more_v.append(values[b, h, there].mean(0))
                    s = scores[b, h, rows].masked_fill(hidden, -math.inf)
                    all_s = torch.cat([s, *(x[:, None] for x in more_s)], 1)
                    all_v = torch.cat([values[b, h], *(x[None] for x in more_v)], 0)
                    wanted[h] += (all_s.softmax(-1) @ all_v - dense[b, h, rows]).square().sum()
        assert torch.allclose(error[choice], wanted, rtol=1e-4)


def test_autocast_changes_nothing() -> None:
    q, k, v, mask = _drawn()
    kept = torch.rand(2, H, len(CELLS), len(CELLS)) > 0.5
    expected = *cell_mass(q, k, CELLS, key_mask=mask), *share_errors(q, k, v, CELLS, kept, True, key_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = *cell_mass(q, k, CELLS, key_mask=mask), *share_errors(q, k, v, CELLS, kept, True, key_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
