"""Means, scores and spreads of tiles against loops in float64."""

import itertools
import math

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.kernels.reference.likeness import parts_of_tiles
from genattn.selection.estimate import PooledScore, estimate
from genattn.selection.guards import Similarity, beside, holds, shares_tokens
from genattn.selection.pooling import likeness_among, likeness_to_mean, tile_means, tile_variances
from genattn.selection.tiling import Boxes, Clusters, Runs, tiling_named

TILES = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1], [-1, -1, -1, -1]], dtype=torch.int32)
X = torch.randn(2, 9, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_means_and_variances() -> None:
    whole, halves, spread = tile_means(X, TILES), tile_means(X, TILES, 2), tile_variances(X, TILES)
    for tile, tokens in enumerate(([0, 1, 2, 3], [4, 5], [6, 7, 8])):
        mine = X[:, tokens]
        assert torch.allclose(whole[:, :, tile, 0], mine.mean(1))
        assert torch.allclose(spread[:, :, tile], mine.var(1, unbiased=False))
    assert torch.allclose(halves[:, :, 0, 1], X[:, 2:4].mean(1))
    assert torch.allclose(halves[:, :, 2, 1], X[:, 8])
    assert not whole[:, :, 3].any()
    assert not halves[:, :, 1, 1].any()
    assert tile_means(X.float(), TILES).dtype == torch.float32


def test_variances_inside_halves_are_around_both_means() -> None:
    found = tile_variances(X, TILES, halves=True)
    halves = parts_of_tiles(X, TILES, 2).unflatten(2, (-1, 2))
    for sample, head, tile in itertools.product(range(2), range(3), range(4)):
        tokens = (TILES[tile] >= 0).sum()
        apart = torch.zeros(5, dtype=torch.float64)
        for part in halves[sample, head, tile]:
            mine = X[sample, part[part >= 0].long(), head]
            apart += (mine - mine.mean(0)).square().sum(0) if len(mine) else 0
        torch.testing.assert_close(found[sample, head, tile], apart / max(1, int(tokens)))
    assert bool((found[:, :, :3].sum(-1) < tile_variances(X, TILES)[:, :, :3].sum(-1)).all())


def test_spread_of_halves_follows_the_query_heads_of_a_key_head() -> None:
    query = torch.randn(2, 9, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimate(query, X, TILES, TILES, PooledScore(), spread=True, halves=True)
    variance = tile_variances(X, TILES, halves=True).repeat_interleave(2, dim=1)
    assert torch.equal(found.variance, variance)  # type: ignore[arg-type]


def test_likeness() -> None:
    unit = torch.nn.functional.normalize(X, dim=-1)
    pairs = torch.einsum("bihd,bjhd->bhij", unit[:, 6:9], unit[:, 6:9]).mean((2, 3))
    assert torch.allclose(likeness_among(X, TILES)[:, :, 2], pairs)
    mean = torch.nn.functional.normalize(X[:, 6:9].mean(1), dim=-1)
    assert torch.allclose(likeness_to_mean(X, TILES)[:, :, 2], (unit[:, 6:9] * mean[:, None]).sum(-1).mean(1))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_scores_mass_and_spread(levels: int) -> None:
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(2, 9, 6, 5, generator=draw, dtype=torch.float64)  # two query heads on each key head
    tiles = TILES[:3]
    found = estimate(query, X, tiles, tiles, PooledScore(levels), spread=True)
    counts = [4, 2, 3]
    for head in range(6):
        for i in range(3):
            rows = tiles[i][tiles[i] >= 0].long()
            mean = query[:, rows, head].mean(1) / math.sqrt(5)
            scores = []
            for j in range(3):
                lanes = tiles[j].long()
                pieces = [p[p >= 0] for p in lanes.view(2**levels, -1)]
                each = torch.stack([(mean * X[:, p, head // 2].mean(1)).sum(-1) for p in pieces if len(p)])
                scores.append(each.logsumexp(0) - math.log(len(each)))
            score = torch.stack(scores, -1)
            assert torch.allclose(found.score[:, head, i], score)
            weighted = (score + torch.tensor(counts).log()).softmax(-1).mean(0)
            assert torch.allclose(found.mass[head, i], weighted)
            spread = [
                (mean.square() * X[:, tiles[j][tiles[j] >= 0].long(), head // 2].var(1, unbiased=False)).sum(-1)
                for j in range(3)
            ]
            assert torch.allclose(found.spread[head, i], torch.stack(spread, -1).sqrt().mean(0))


def test_shut_and_empty_tiles_have_no_mass() -> None:
    open = torch.ones(1, 4, 4, dtype=torch.bool)
    open[..., 1] = False
    found = estimate(X, X, TILES, TILES, PooledScore(1), open=open)
    assert not found.mass[..., 1].any()
    assert not found.mass[..., 3].any()
    assert torch.allclose(found.mass.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(GenAttnError, match="got an estimate without"):
        _ = found.spread


def test_as_many_clusters_as_tiles() -> None:
    assert Clusters().counts(512, 16, 32) == (32, 16)
    assert Clusters().counts(5, 16, 16) == (1, 1)
    assert Clusters(3, 4).counts(512, 16, 16) == (3, 4)
    assert [Clusters().stride(n, 32) for n in (512, 1024, 2048, 99999)] == [1, 2, 4, 4]
    assert Clusters(sample=1).stride(99999, 32) == 1


def test_guards() -> None:
    assert Similarity(1.0).unlike(X, TILES[:3], True).all()
    assert not Similarity(-1.0).unlike(X, TILES[:3], True).any()
    same = torch.ones(1, 9, 1, 4)
    assert Similarity(0.5, of="pairs", centred=True).unlike(same, TILES[:3], True).all()  # nothing is left of equal keys
    assert not Similarity(0.5, of="pairs", centred=True).unlike(same, TILES[:3], False).any()
    own = shares_tokens(TILES[:3], TILES[:3], 9)
    assert torch.equal(own, torch.eye(3, dtype=torch.bool))
    assert beside(own, torch.tensor([True, True, True]), 1).tolist() == [[True, True, False], [True] * 3, [False, True, True]]
    assert beside(own, torch.tensor([False, True, True]), 1)[1].tolist() == [False, True, True]
    text = torch.zeros(9, dtype=torch.bool)
    text[5] = True
    assert holds(TILES, text).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PooledScore(9), "levels must be a whole number between 0 and 8, got 9"),
        (lambda: Similarity(2.0), r"least must be a cosine in \[-1, 1\], got 2.0"),
        (lambda: Similarity(of="all"), "of must be one of mean, pairs, got 'all'"),  # type: ignore[arg-type]
        (lambda: Boxes((0, 4)), "block must be tokens per tile >= 1"),
        (lambda: Runs((1, 2, 3)), "block must be tokens per tile >= 1"),  # type: ignore[arg-type]
        (lambda: Clusters(query=0), "clusters of query must be a whole number >= 1 or None, got 0"),
        (lambda: Clusters(iterations=0), "iterations must be a whole number >= 1, got 0"),
        (lambda: Clusters(2, 99).counts(64), "clusters of key must be at most the 64 tokens of the grid, got 99"),
        (lambda: tiling_named("squares"), "tiles must be one of boxes, runs, clusters or a tiling object, got 'squares'"),
    ],
)
def test_refusals(make: object, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_short_tiles_are_ranked_as_long_ones(levels: int) -> None:
    """Equal keys give equal scores, however many pieces of a tile hold tokens."""
    tiles = torch.arange(48).view(3, 16)
    tiles[-1, 4:] = -1
    query, key = torch.randn(1, 36, 1, 8), torch.ones(1, 36, 1, 8)
    found = estimate(query, key, tiles, tiles, PooledScore(levels=levels))
    torch.testing.assert_close(found.score, found.score[..., :1].expand_as(found.score))


@pytest.mark.parametrize(("token", "tile"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_a_tile_holds_a_token(token: int, tile: int) -> None:
    """The first token counts as the others do, and an unused lane holds none."""
    tiles = torch.tensor([[0, -1], [1, 2], [3, -1]])
    assert holds(tiles, torch.arange(4) == token).tolist() == [place == tile for place in range(3)]
