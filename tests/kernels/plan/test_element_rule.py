"""The rules against their definition, written out pair by pair."""

import pytest
import torch

from genattn.kernels.plan.element_rule import PADDING, BlockRule, CombinedRule, HeadOf, PerHeadRule, rule_of_head
from genattn.kernels.plan.random_plan import plan_from_rule

TABLE = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.4
PLACE = torch.tensor([4, -1, 0, 5, PADDING, 2, 8, -1, 7, 3, 6, 1, PADDING], dtype=torch.int32)


def wanted(head: int, query: int, key: int, place: torch.Tensor | None) -> bool:
    q, k = (query, key) if place is None else (int(place[query]), int(place[key]))
    if k == PADDING:
        return False
    return q < 0 or k < 0 or bool(TABLE[head, q // 3, k // 3])


@pytest.mark.parametrize("place", [None, PLACE])
def test_a_block_rule_sees_globals_and_never_padding(place: torch.Tensor | None) -> None:
    rule, count = BlockRule(TABLE, 3, place), 9 if place is None else len(PLACE)
    index = torch.arange(count)
    found = rule(index[:, None], index[None, :])
    for head in range(2):
        for query in range(count):
            for key in range(count):
                assert bool(found[head, query, key]) == wanted(head, query, key, place), (head, query, key)
    moved = rule.to("cpu")(index[:, None], index[None, :])
    assert torch.equal(moved, found)


def test_one_head_of_any_rule() -> None:
    index = torch.arange(len(PLACE))
    rule = BlockRule(TABLE, 3, PLACE)
    shared = BlockRule(TABLE[:1], 3, PLACE)
    for whole in (rule, CombinedRule((rule, shared), "all"), PerHeadRule((shared, BlockRule(TABLE[1:], 3, PLACE)), (1, 0))):
        seen = whole(index[:, None], index[None, :])
        for head in range(2):
            for one in (rule_of_head(whole, head), HeadOf(whole, head)):
                assert torch.equal(one(index[:, None], index[None, :]), seen[head : head + 1])


def test_one_list_for_heads_that_differ_is_their_union() -> None:
    """Also with a single query tile, where heads and tiles could be taken for each other."""
    table = torch.tensor([[[True, False, False]] * 3, [[False, True, False]] * 3])
    tiles = torch.arange(9).view(3, 3)
    plan = plan_from_rule(BlockRule(table, 3, None), tiles[:1], tiles, 9)
    assert plan.num_heads == 1
    assert sorted(plan.columns.tolist()) == [0, 1]
    assert int(plan.num_full) == 0, "full is what every head sees whole"


def test_rules_that_cannot_be_joined_are_refused() -> None:
    each, one = BlockRule(TABLE, 3, PLACE), BlockRule(TABLE[:1], 3, PLACE)
    with pytest.raises(ValueError, match="op must be 'any' or 'all', got 'some'"):
        CombinedRule((one, one), "some")
    with pytest.raises(ValueError, match="a combined rule needs at least one rule, got none"):
        CombinedRule(())
    with pytest.raises(ValueError, match=r"each rule must serve all heads, got num_heads \[1, 2\]"):
        PerHeadRule((one, each), (0, 1))
    for choice in ((), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=r"choice must name rules 0\.\.1 for every head"):
            PerHeadRule((one, one), choice)
