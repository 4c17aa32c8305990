"""From chosen tile pairs to plans: the same tiles for all heads, tiles of each head's own, or mixed with static patterns."""

from collections.abc import Sequence

import numpy as np
import torch

from genattn.geometry.plan_build import plan_from_codes, tile_codes
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.head_tiles import HeadTileRule, HeadTiles


def plan_of_listed(listed: torch.Tensor, query_tiles: torch.Tensor, key_tiles: torch.Tensor, seqlen: int) -> BlockPlan:
    """The plan that visits the pairs of `listed`, bool [H, NQ, NK], whole; int32 tiles [N, lanes] on the same device."""
    visits = listed.sum(-1)
    ends = visits.flatten().cumsum(0).view_as(visits)
    ptr = torch.cat([ends[:, :1] - visits[:, :1], ends], dim=1).to(torch.int32)
    columns = listed.nonzero()[:, 2].to(torch.int32)
    return BlockPlan(query_tiles, key_tiles, ptr, columns, visits.to(torch.int32), None, seqlen, seqlen)


def static_codes(rule: ElementRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> torch.Tensor:
    """Uint8 [N, NQ, NK] on the CPU: 0 nothing, 1 something, 2 everything of each tile pair is visible under `rule`."""
    codes = tile_codes(rule, query_tiles.cpu(), key_tiles.cpu())
    count = query_tiles.shape[0]
    return torch.stack([torch.from_numpy(codes.rows(head, 0, count)) for head in range(codes.num_heads)])


class _GivenCodes:
    """Codes that are there already."""

    def __init__(self, codes: np.ndarray) -> None:
        self.codes, self.num_heads = codes, codes.shape[0]

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        return self.codes[head, start:stop]


def plan_of_codes(
    codes: torch.Tensor, query_tiles: torch.Tensor, key_tiles: torch.Tensor, rule: ElementRule, seqlen: int
) -> BlockPlan:
    """The plan of uint8 codes [H, NQ, NK]; `rule` decides inside pairs of code 1."""
    return plan_from_codes(_GivenCodes(codes.cpu().numpy()), query_tiles.cpu(), key_tiles.cpu(), rule, seqlen)


def clustered_plan(
    query_labels: torch.Tensor,
    key_labels: torch.Tensor,
    listed: torch.Tensor,
    places: torch.Tensor,
    others: torch.Tensor,
    padding: torch.Tensor,
    seqlen: int,
    block: tuple[int, int],
) -> HeadTiles:
    """The plan in which the tokens of one cluster stand together, cut into tiles of at most `block` (query, key) tokens.

    query_labels, key_labels: int64 [H, n], cluster of each of the n grid tokens that stand at `places` int64 [n]. listed: bool
    [H, QC, KC], which clusters see each other. others: places of the tokens that see all and are seen by all; padding: of
    those that see all and are seen by none. Every tile pair is visited whole.
    """
    heads = query_labels.shape[0]
    sides = []
    for labels, clusters, lanes, more in (
        (query_labels, listed.shape[1], block[0], padding),
        (key_labels, listed.shape[2], block[1], padding[:0]),
    ):
        tail = [_runs(part, lanes) for part in (others, more) if part.numel()]
        sides.append([_cluster_tiles(labels[h], clusters, places, lanes, tail) for h in range(heads)])
    wide = [_wide(listed[h], sides[0][h][1], sides[1][h][1]) for h in range(heads)]
    tiles = [torch.cat([_folded(t, h, heads) for h, (t, _) in enumerate(side)]).to(torch.int32) for side in sides]
    starts = np.cumsum([0, *(len(t) for t, _ in sides[1])])
    visits = torch.cat([w.sum(1) for w in wide])
    columns = torch.cat([w.nonzero()[:, 1] + int(start) for w, start in zip(wide, starts)]).to(torch.int32)
    ptr = torch.nn.functional.pad(visits.cumsum(0), (1, 0))[None].to(torch.int32)
    total = seqlen * heads
    folded = BlockPlan(tiles[0], tiles[1], ptr, columns, visits[None].to(torch.int32), None, total, total)
    return HeadTiles(folded, heads, seqlen)


def _cluster_tiles(
    labels: torch.Tensor, clusters: int, places: torch.Tensor, lanes: int, tail: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles int64 [n, lanes] of token places, cluster of each tile int64 [n], -1 for tiles of no cluster) of one head."""
    order = torch.argsort(labels, stable=True)
    count = torch.bincount(labels, minlength=clusters)
    parts = (count + lanes - 1) // lanes
    first = torch.nn.functional.pad(parts.cumsum(0), (1, 0))[:-1]
    inside = torch.arange(labels.numel(), device=labels.device) - (count.cumsum(0) - count)[labels[order]]
    spot = first[labels[order]] * lanes + inside
    tiles = torch.full((int(parts.sum()) * lanes,), -1, dtype=torch.int64, device=labels.device)
    tiles[spot] = places[order]
    owner = torch.repeat_interleave(torch.arange(clusters, device=labels.device), parts)
    added = [t.to(labels.device) for t in tail]
    owner = torch.cat([owner, *(owner.new_full((len(t),), -1) for t in added)])
    return torch.cat([tiles.view(-1, lanes), *added]), owner


def _wide(listed: torch.Tensor, query_owner: torch.Tensor, key_owner: torch.Tensor) -> torch.Tensor:
    """Bool [tiles of queries, tiles of keys] of one head; tiles without a cluster see all and are seen by all."""
    seen = listed[query_owner.clamp_min(0)][:, key_owner.clamp_min(0)]
    return seen | (query_owner < 0)[:, None] | (key_owner < 0)


def _folded(tiles: torch.Tensor, head: int, heads: int) -> torch.Tensor:
    return torch.where(tiles >= 0, tiles * heads + head, -1)


def _runs(places: torch.Tensor, lanes: int) -> torch.Tensor:
    return torch.nn.functional.pad(places, (0, -places.numel() % lanes), value=-1).view(-1, lanes)


def visible_codes(listed: torch.Tensor) -> torch.Tensor:
    """Chosen pairs as codes: everything or nothing."""
    return listed.to(torch.uint8) * 2


def combined_codes(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """Uint8 [H, NQ, NK] of codes [H or 1, NQ, NK] under "any" or "all".

    Where two parts both see something but not everything, the result says something: the rule decides there.
    """
    heads = max(part.shape[0] for part in parts)
    stacked = torch.stack([part.expand(heads, -1, -1) for part in parts])
    return stacked.amax(0) if op == "any" else stacked.amin(0)


def combined_head_tiles(plan: HeadTiles, rule: ElementRule, op: str) -> HeadTiles:
    """The tiles of `plan` under "any" or "all" with what `rule`, one for all heads or one per head, shows of tokens.

    Slower than on boxes: tokens of a cluster stand anywhere, so each is a piece of its own when the rule is asked.
    """
    folded, heads = plan.folded.to("cpu"), plan.heads
    owners = [torch.where(t[:, 0] >= 0, t[:, 0] % heads, -1) for t in (folded.query_tiles, folded.key_tiles)]
    count, full, columns = torch.zeros(len(owners[0]), dtype=torch.int64), torch.zeros(len(owners[0]), dtype=torch.int64), []
    for head in range(heads):
        rows, cols = ((owner == head).nonzero().flatten() for owner in owners)
        tiles = [_tokens(t[at], heads) for t, at in ((folded.query_tiles, rows), (folded.key_tiles, cols))]
        codes = tile_codes(rule, *tiles).rows(head if rule.num_heads > 1 else 0, 0, len(rows))
        listed = torch.zeros(len(rows), len(owners[1]), dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            listed[place, folded.columns[int(folded.row_ptr[0, row]) : int(folded.row_ptr[0, row + 1])].long()] = True
        both = combined_codes([visible_codes(listed[:, cols])[None], torch.from_numpy(codes)[None]], op)[0]
        count[rows], full[rows] = (both > 0).sum(1), (both == 2).sum(1)
        # in each list the full ones come first
        columns += [cols[torch.cat([(row == 2).nonzero(), (row == 1).nonzero()]).flatten()] for row in both]
    ptr = torch.nn.functional.pad(count.cumsum(0), (1, 0))[None].to(torch.int32)
    lists = torch.cat(columns).to(torch.int32), full[None].to(torch.int32)
    total = folded.seqlen_q
    made = BlockPlan(folded.query_tiles, folded.key_tiles, ptr, *lists, HeadTileRule(rule, heads), total, total)
    return HeadTiles(made, heads, plan.seqlen).to(plan.device)


def _tokens(tiles: torch.Tensor, heads: int) -> torch.Tensor:
    """Places of a folded sequence as tokens."""
    return torch.where(tiles >= 0, torch.div(tiles, heads, rounding_mode="floor"), -1)
