"""Plans drawn at random, for holding every backend against the definition: tests, and the check before each benchmark.

A drawn plan is harder than a real one: scattered tiles with unused lanes, global and padding tokens, several classes of
frame pairs with odd windows, dilation, wrapping axes, lists and rules per head, queries that see nothing.
"""

import torch

from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.element_rule import ElementRule, GridRule
from genattn.kernels.plan.fade import HIGHEST, LOWEST, Fade


def random_plan(
    seed: int,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    globals_: int = 9,
    padding: int = 0,
    block_q: int = 16,
    block_k: int = 16,
    heads: int = 1,
    scattered: bool = False,
    keep: float = 0.8,
) -> BlockPlan:
    """A self-attention plan over `grid` tokens, then `globals_` text tokens, then `padding` ones.

    heads > 1 draws lists and rule per head. `scattered` makes tiles of shuffled tokens with unused lanes. `keep` is the
    share of the visible tile pairs that stay listed.
    """
    draw = torch.Generator().manual_seed(seed)
    rule = random_grid_rule(draw, grid, globals_, padding, heads)
    seqlen = rule.coords.shape[0]
    query_tiles = _scattered_tiles(draw, seqlen, block_q) if scattered else run_tiles(seqlen, block_q)
    key_tiles = _scattered_tiles(draw, seqlen, block_k) if scattered else run_tiles(seqlen, block_k)
    return plan_from_rule(rule, query_tiles, key_tiles, seqlen, heads, draw, keep)


def random_fade(plan: BlockPlan, seed: int, factor: float = 0.7, penalty: float = 0.9, places: int = 6) -> Fade:
    """Windows and spans anywhere among `places`; a tile of either kind in eight is inside with all."""
    draw = torch.Generator().manual_seed(seed)
    tables = []
    for tiles in (len(plan.query_tiles), len(plan.key_tiles)):
        ends = torch.randint(0, places, (tiles, 2), generator=draw).sort(1).values.to(torch.int32)
        everywhere = torch.rand(tiles, 1, generator=draw) < 1 / 8
        tables.append(torch.where(everywhere, torch.tensor([[LOWEST, HIGHEST]], dtype=torch.int32), ends))
    return Fade(tables[0], tables[1], factor, penalty)


def random_grid_rule(
    draw: torch.Generator, grid: tuple[int, int, int], globals_: int, padding: int, heads: int = 1
) -> GridRule:
    """A grid rule with three classes of frame pairs, among them an empty and a full window, and random axis options."""
    frames, height, width = grid
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    coords = torch.stack([a.flatten() for a in axes], 1)
    tail = torch.tensor([[-1, 0, 0]] * globals_ + [[-2, 0, 0]] * padding, dtype=torch.long).view(-1, 3)
    longest = max(height, width)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw, dtype=torch.int32)

    windows = ints(1, longest + 2, heads, 3, 2, longest)
    windows[:, 0] = ints(0, 3, heads, 2, longest)
    circular = (bool(ints(0, 2, 1)), bool(ints(0, 2, 1)))
    low = ints(-2, longest, heads, 3, 2, longest)
    low[:, 2], windows[:, 2] = 0, longest
    return GridRule(
        torch.cat([coords, tail]).to(torch.int32),
        ints(-1, 3, heads, frames, frames),
        low,
        windows,
        (height, width),
        (int(ints(1, 3, 1)), int(ints(1, 3, 1))),
        circular,
    )


def plan_from_rule(
    rule: ElementRule,
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    seqlen: int,
    heads: int = 1,
    draw: torch.Generator | None = None,
    keep: float = 1.0,
) -> BlockPlan:
    """The exact plan of any rule, by evaluating every element: for short sequences."""
    used_q, used_k = query_tiles >= 0, key_tiles >= 0
    q, k = query_tiles.clamp_min(0).long(), key_tiles.clamp_min(0).long()
    seen = rule(q[:, None, :, None], k[None, :, None, :])
    lanes = (used_q[:, None, :, None] & used_k[None, :, None, :])[None]
    visited = (seen & lanes).flatten(3).any(3)
    full = (seen | ~lanes).flatten(3).all(3) & visited
    if heads == 1 and seen.shape[0] > 1:
        visited, full = visited.any(0, keepdim=True), full.all(0, keepdim=True)
    visited, full = visited.expand(heads, -1, -1), full.expand(heads, -1, -1)
    if keep < 1.0:
        visited = visited & (torch.rand(visited.shape, generator=draw) < keep)
        full = full & visited
    return plan_from_states(visited.int() + full.int(), query_tiles, key_tiles, rule, seqlen, seqlen)


def plan_from_states(
    states: torch.Tensor,
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    rule: ElementRule | None,
    seqlen_q: int,
    seqlen_k: int,
) -> BlockPlan:
    """The plan of a table of tile pairs, int [N, NQ, NK]: 0 skipped, 1 partial, 2 full."""
    heads, rows, _ = states.shape
    counts = (states > 0).sum(2).flatten()
    ends = counts.cumsum(0).view(heads, rows)
    row_ptr = torch.cat([(ends[:, -1] - counts.view(heads, rows).sum(1))[:, None], ends], 1)
    order = torch.argsort(states, dim=2, descending=True, stable=True)
    columns = order[torch.gather(states, 2, order) > 0]
    num_full = (states == 2).sum(2)
    return BlockPlan(query_tiles, key_tiles, row_ptr.int(), columns.int(), num_full.int(), rule, seqlen_q, seqlen_k)


def _scattered_tiles(draw: torch.Generator, seqlen: int, block: int) -> torch.Tensor:
    """Tiles of shuffled tokens in which about an eighth of the lanes is unused."""
    filled = max(1, block - block // 8)
    tokens = torch.randperm(seqlen, generator=draw).int()
    rows = -(-seqlen // filled)
    tiles = torch.full((rows, block), -1, dtype=torch.int32)
    for row, chunk in enumerate(tokens.split(filled)):
        lanes = torch.randperm(block, generator=draw)[: chunk.numel()]
        tiles[row, lanes] = chunk
    return tiles
