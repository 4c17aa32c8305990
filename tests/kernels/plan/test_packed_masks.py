"""Packed masks against the rule, bit by bit, and who shares them."""

import pytest
import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.element_rule import BlockRule, CombinedRule, PerHeadRule, rule_of_head
from genattn.kernels.plan.packed_masks import mask_bytes, mask_owners, owned_slots, packed_masks
from genattn.kernels.plan.random_plan import plan_from_rule, random_grid_rule, random_plan
from genattn.patterns.combine import PerHead, Union
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

LAYOUT = TokenLayout.from_grid((6, 8, 9), text_after=5)
PARTS = (RadialPattern(decay=0.2, floor=0, sink=False), NeighborhoodPattern((2, 3, 3)))


def _seen(plan, slots, bits, head, entry):
    """Bool [BQ, BK] of one entry from its bits."""
    words = bits[slots[head if slots.shape[0] > 1 else 0, entry].long()].int() & 0xFFFF
    return ((words[:, :, None] >> torch.arange(16)) & 1).bool().flatten(1)[:, : plan.block_k]


@pytest.mark.parametrize(
    "plan",
    [
        Union(*PARTS).plan(LAYOUT, 16, 32),
        PerHead(PARTS, (0, 1, 1, 0, 1)).plan(LAYOUT, 32, 16),
        random_plan(5, (2, 4, 5), heads=3, scattered=True),
    ],
    ids=["union", "per head", "lists per head"],
)
def test_every_bit_is_what_the_rule_says(plan):
    slots, bits = packed_masks(plan)
    assert bits.numel() * 2 == mask_bytes(plan) > 0
    row, partial = plan.entries
    tiles = plan.query_tiles.shape[0]
    for entry in torch.nonzero(partial).flatten().tolist():
        listed = int(row[entry]) // tiles
        queries, keys = plan.query_tiles[row[entry] % tiles].long(), plan.key_tiles[plan.columns[entry].long()].long()
        want = plan.rule(queries.clamp_min(0)[:, None], keys.clamp_min(0)[None])
        want = want & (queries >= 0)[:, None] & (keys >= 0)
        for head in [listed] if plan.num_heads > 1 else range(plan.mask_heads):
            assert torch.equal(_seen(plan, slots, bits, head, entry), want[head])


def test_heads_of_one_rule_share_their_masks():
    heads = (0, 0, 1, 0, 1, 1, 1, 0)
    plan = PerHead(PARTS, heads).plan(LAYOUT, 16, 16)
    assert mask_owners(plan) == [0, -1, 2, -1, -3, -3, -3, -1]
    alone = PerHead(PARTS, (0, 1)).plan(LAYOUT, 16, 16)
    assert mask_bytes(plan) == mask_bytes(alone), "as many as for one head of each rule"
    slots, _ = packed_masks(plan)
    mine = owned_slots(plan, slots)
    owned = mine[mine >= 0]
    assert owned.unique().numel() == owned.numel() == int(slots.max()) + 1, "each mask is written once"


def test_heads_of_other_lists_do_not():
    rule = PerHeadRule((BlockRule(torch.rand(1, 5, 5) < 0.5, 8),), (0, 0))
    tiles = torch.arange(32, dtype=torch.int32).view(2, 16)
    draw = torch.Generator().manual_seed(0)
    plan = plan_from_rule(rule, tiles, tiles, 32, 2, draw, keep=0.5)
    assert mask_owners(plan) == [0, 1]


def test_only_the_head_that_owns_an_entry_is_evaluated():
    asked = []

    class Told:
        num_heads = 1

        def __init__(self, name):
            self.name = name

        def __call__(self, query, key):
            asked.append(self.name)
            return (query + key)[None] % 2 == 0

        def to(self, device):
            return self

    tiles = torch.arange(32, dtype=torch.int32).view(2, 16)
    plan = plan_from_rule(PerHeadRule((Told("a"), Told("b")), (0, 1, 1)), tiles, tiles, 32, 3)
    asked.clear()
    packed_masks(plan)
    assert sorted(asked) == ["a", "b"], "once each, not three heads a turn"


def test_the_rule_of_a_head():
    draw = torch.Generator().manual_seed(3)
    grid, block = random_grid_rule(draw, (2, 3, 4), 3, 2, heads=2), BlockRule(torch.rand(2, 5, 5) < 0.5, 6)
    query, key = torch.arange(29)[:, None], torch.arange(29)[None]

    class Odd:
        num_heads = 2

        def __call__(self, query, key):
            return torch.stack([query <= key, query > key])

        def to(self, device):
            return self

    per_head = PerHeadRule((rule_of_head(grid, 0), rule_of_head(block, 1)), (1, 0))
    for rule in (grid, block, CombinedRule((grid, block), "all"), per_head, Odd()):
        for head in range(2):
            one = rule_of_head(rule, head)
            assert one.num_heads == 1
            assert torch.equal(one.to("cpu")(query, key)[0], rule(query, key)[head])
    assert rule_of_head(rule_of_head(grid, 1), 1).num_heads == 1
