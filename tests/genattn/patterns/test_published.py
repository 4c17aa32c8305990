"""The named selections against a direct transcription of the published formulas, tile by tile, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.kernels.reference.attention import tile_states, visible_mask
from genattn.patterns.published import PUBLISHED, published, sol, sparge, svg2
from genattn.selection.kmeans import kmeans

HEADS, DIM = 2, 6


def _drawn(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, TokenLayout]:
    """Neighbouring tokens resemble each other, so that some tiles pass for like themselves and some do not."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(2, 1, tokens // 50 + 1, HEADS, DIM, generator=draw, dtype=torch.float64)
    x = base.repeat_interleave(50, dim=2)[:, :, :tokens] * 2
    x = x + torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return x[0], x[1], TokenLayout.from_grid((tokens,))


def _listed(plan: object) -> torch.Tensor:
    assert isinstance(plan, BlockPlan)
    return tile_states(plan) > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(130, 900), st.floats(-0.5, 2.0), st.sampled_from(["diag", "exact"]))
def test_sol(seed: int, tokens: int, tau: float, variance: str) -> None:
    query, key, layout = _drawn(seed, tokens)
    got = _listed(sol(tau, variance).plan_for(query, key, layout))
    blocks = -(-tokens // 64)
    scale = DIM**-0.5 * math.log2(math.e)  # the release works in bits
    for head in range(HEADS):
        kbar = torch.stack([key[0, 64 * j : 64 * j + 64, head].mean(0) for j in range(blocks)])
        for i in range(blocks):
            qbar = query[0, 64 * i : 64 * i + 64, head].mean(0)
            mean = float(qbar @ kbar.mean(0)) * scale
            if variance == "exact":
                raw = float(qbar @ (kbar.T @ kbar / blocks) @ qbar) - float(qbar @ kbar.mean(0)) ** 2
            else:
                raw = float((qbar.square() * (kbar - kbar.mean(0)).square().mean(0)).sum())
            mark = mean + tau * math.sqrt(max(raw, 0.0) * scale**2 + 1e-6)
            scores = [float(qbar @ kbar[j]) * scale for j in range(blocks)]
            wanted = [s > mark or abs(i - j) <= 1 for j, s in enumerate(scores)]
            # ours keeps the heaviest tile of a row where nothing passes
            weight = [s + math.log2(min(64, tokens - 64 * j)) for j, s in enumerate(scores)]
            wanted[weight.index(max(weight))] = True
            assert got[head, i].tolist() == wanted


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(130, 900), st.floats(0.3, 0.99), st.floats(0.2, 0.8))
def test_sparge(seed: int, tokens: int, p: float, similarity: float) -> None:
    query, key, layout = _drawn(seed, tokens)
    got = _listed(sparge(p, similarity).plan_for(query, key, layout))
    smooth = key - key.mean(1, keepdim=True)
    rows, columns = -(-tokens // 128), -(-tokens // 64)

    def like(block: torch.Tensor) -> bool:
        unit = block / block.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).sum()) / len(block) ** 2 > similarity

    for head in range(HEADS):
        keys = [smooth[0, 64 * j : 64 * j + 64, head] for j in range(columns)]
        good = [like(block) for block in keys]
        for i in range(rows):
            block = query[0, 128 * i : 128 * i + 128, head]
            score = torch.stack([block.mean(0) @ k.mean(0) for k in keys]) * DIM**-0.5
            score[[not g for g in good]] = -math.inf
            wanted = [not g for g in good]
            if any(good):
                mass, order = score.softmax(-1).sort(descending=True)
                count = max(1, int((mass.cumsum(-1) <= p).sum()))
                for j in order[:count].tolist():
                    wanted[j] = True
            if not like(block):
                wanted = [True] * columns
            own = {t // 64 for t in range(128 * i, min(tokens, 128 * i + 128))}  # ours: every query sees its own place
            assert got[head, i].tolist() == [w or j in own for j, w in enumerate(wanted)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(60, 300), st.floats(0.3, 0.99), st.sampled_from([0.0, 0.25]))
def test_svg2(seed: int, tokens: int, p: float, least: float) -> None:
    query, key, layout = _drawn(seed, tokens)
    plan = svg2(p, least, 7, 11, iterations=3).plan_for(query, key, layout, 16, 16)
    assert isinstance(plan, HeadTiles)
    seen = visible_mask(plan.folded)[0].view(tokens, HEADS, tokens, HEADS)
    labels_q, centres_q = kmeans(query[0].transpose(0, 1), 7, 3)
    labels_k, centres_k = kmeans(key[0].transpose(0, 1), 11, 3)
    for head in range(HEADS):
        count = torch.bincount(labels_k[head], minlength=11).double()
        for i in range(7):
            score = centres_q[head, i] @ centres_k[head].T / math.sqrt(DIM)
            mass = count * (score - score.max()).exp()
            mass = mass / mass.sum()
            values, order = mass.sort(descending=True)
            remove = values.cumsum(-1) > p
            remove = torch.cat([torch.tensor([False]), remove[:-1]])
            remove[: int(least * 11)] = False
            kept = set(order[~remove].tolist())
            rows = (labels_q[head] == i).nonzero().flatten()
            wanted = torch.tensor([int(c) in kept for c in labels_k[head]])
            for row in rows.tolist():
                assert torch.equal(seen[row, head, :, head], wanted)


def test_names_and_refusals() -> None:
    assert set(PUBLISHED) == {"sol", "sparge", "svg2"}
    assert published("sol", tau=1.3) == sol(1.3)
    with pytest.raises(GenAttnError, match="must be one of sol, sparge, svg2, got 'vsa'"):
        published("vsa")
    with pytest.raises(GenAttnError, match="settings of sparge: .*unexpected"):
        published("sparge", taus=1)
