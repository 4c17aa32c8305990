"""The content-adaptive selector: what it must always keep, that it finds planted blocks, and that it beats a static choice."""

import math

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.reference.attention import reference_attention
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern

LAYOUT = TokenLayout.from_grid((6, 8, 8), text_after=10)


def _planted(seed: int = 0, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of 8 topics; a token attends to its own topic, wherever on the grid it stands."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=-1) * 12
    token = torch.arange(LAYOUT.seqlen)
    place = token // 32 * 2 + token % 8 // 4  # 4 x 4 tokens share a topic
    topic = torch.randint(0, 8, (int(place.max()) + 1,), generator=generator)[place]
    x = topics[topic][None, :, None].expand(1, -1, heads, -1)
    noise = torch.randn(2, *x.shape, generator=generator)
    return x + noise[0], x + noise[1]


def _error(plan: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dense: torch.Tensor) -> float:
    out = reference_attention(query, key, value, plan)[0]  # type: ignore[arg-type]
    return float((out - dense).norm() / dense.norm())


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_finds_what_the_static_pattern_misses(levels: int) -> None:
    query, key = _planted()
    value = torch.randn(query.shape)
    dense = reference_attention(query, key, value, DensePattern().plan(LAYOUT, 16, 16))[0]
    plan = BlockTopK(keep=0.3, levels=levels).plan_for(query, key, LAYOUT, 16, 16)
    static = NeighborhoodPattern((3, 6, 6)).plan(LAYOUT, 16, 16)
    assert plan.density < 0.45
    assert _error(plan, query, key, value, dense) < 0.5 * _error(static, query, key, value, dense)


def test_always_kept() -> None:
    """Text sees and is seen, every query tile sees its own place, padding is no key."""
    layout = TokenLayout((Segment("text", (5,)), Segment("grid", (3, 5, 7)), Segment("padding", (6,))))
    query, key = torch.randn(2, layout.seqlen, 4, 8), torch.randn(2, layout.seqlen, 2, 8)
    plan = BlockTopK(keep=0.01).plan_for(query, key, layout, 16, 8)
    assert plan.num_heads == 4
    seen = torch.zeros(4, layout.seqlen, layout.seqlen, dtype=torch.bool)
    for head in range(4):
        for tile, rows in enumerate(plan.query_tiles.long()):
            columns = plan.columns[int(plan.row_ptr[head, tile]) : int(plan.row_ptr[head, tile + 1])].long()
            keys = plan.key_tiles[columns].flatten().long()
            seen[head, rows[rows >= 0][:, None], keys[keys >= 0]] = True
    grid = layout.raster_index >= 0
    assert seen[:, :, :5].all()
    assert seen[:, :5, :-6].all()
    assert not seen[:, :, -6:].any()
    assert seen.diagonal(dim1=1, dim2=2)[:, grid].all()
    assert plan.full_share == 1.0


def test_share_kept_and_whole() -> None:
    query, key = torch.randn(1, LAYOUT.seqlen, 2, 8), torch.randn(1, LAYOUT.seqlen, 2, 8)
    whole = BlockTopK(keep=1.0).plan_for(query, key, LAYOUT, 16, 16)
    assert whole.density == pytest.approx(1.0)
    densities = [BlockTopK(keep=k).plan_for(query, key, LAYOUT, 16, 16).density for k in (0.1, 0.3, 0.6)]
    assert densities == sorted(densities)
    assert densities[0] < 0.25
    assert math.isclose(BlockTopK(keep=0.1, min_similarity=1.0).plan_for(query, key, LAYOUT, 16, 16).density, 1.0)


def test_a_strong_key_inside_a_dull_tile_is_found_by_looking_closer() -> None:
    """Half a tile of strong keys beside half a tile of opposite ones: their mean is zero, the halves are not."""
    query, key = torch.randn(1, 384, 1, 8) * 0.1, torch.randn(1, 384, 1, 8) * 0.1
    layout = TokenLayout.from_grid((6, 8, 8))
    query[..., 0] += 4
    key[..., 0] += 0.5
    tiles = BlockTopK(keep=0.1).plan_for(query, key, layout, 16, 16).key_tiles
    strong = tiles[20].long()
    key[0, strong[:8], 0, 0] = 6
    key[0, strong[8:], 0, 0] = -6
    # half of the tiles, and one level that looks at twice as many: the dull tile survives the coarse look
    plans = [BlockTopK(keep=0.5, levels=n).plan_for(query, key, layout, 16, 16) for n in (0, 1)]
    hits = [int((p.columns == 20).sum()) for p in plans]
    assert hits == [1, len(tiles)]


def test_refuses_what_needs_tensors_and_bad_settings() -> None:
    for call in (BlockTopK().plan, BlockTopK().mask, BlockTopK().rule):
        with pytest.raises(GenAttnError, match="plan_for"):
            call(LAYOUT)
    with pytest.raises(GenAttnError, match=r"\[B, 394, H, D\]"):
        BlockTopK().plan_for(torch.zeros(1, 9, 2, 8), torch.zeros(1, 9, 2, 8), LAYOUT)
    for arguments in ({"keep": 0.0}, {"keep": 1.5}, {"min_similarity": 2.0}, {"levels": -1}, {"levels": 9}):
        with pytest.raises(GenAttnError, match=next(iter(arguments))):
            BlockTopK(**arguments)  # type: ignore[arg-type]


def test_static_patterns_ignore_the_tensors() -> None:
    pattern, x = NeighborhoodPattern((3, 3, 3)), torch.zeros(1, LAYOUT.seqlen, 1, 4)
    assert pattern.plan_for(x, x, LAYOUT) is pattern.plan(LAYOUT)
