"""Which entries of a batch belong to one sample, and that each group is answered by its own plan."""

import pytest
import torch

from genattn import NeighborhoodPattern, TokenLayout
from genattn.functional.dispatch import AnyPlan, plan_for, planned_attention
from genattn.functional.each_sample import attention_of_each, rows_of_samples
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.pattern import Pattern, SiteMemory


@pytest.mark.parametrize(
    ("batch", "samples", "passes", "wanted"),
    [
        (4, 2, None, [[0, 2], [1, 3]]),  # [uncond; cond] of two samples
        (6, 2, None, [[0, 2, 4], [1, 3, 5]]),
        (12, 2, 2, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]),  # three frames folded in behind the samples
        (6, 3, 1, [[0, 1], [2, 3], [4, 5]]),
        (3, 2, None, [[0, 1, 2]]),
        (4, 1, None, [[0, 1, 2, 3]]),
        (4, None, None, [[0, 1, 2, 3]]),
        (6, 2, 2, [[0, 1, 2, 3, 4, 5]]),  # does not divide: nothing is guessed
    ],
)
def test_entries_of_a_sample(batch: int, samples: int | None, passes: int | None, wanted: list[list[int]]) -> None:
    assert [rows.tolist() for rows in rows_of_samples(batch, samples, passes)] == wanted


def test_every_group_is_answered_by_its_own_plan() -> None:
    layout = TokenLayout.from_grid((4, 6))
    patterns = NeighborhoodPattern((2, 2)), NeighborhoodPattern((4, 3))
    query, key, value = (torch.randn(4, layout.seqlen, 2, 16) for _ in range(3))
    mask = torch.rand(4, layout.seqlen) < 0.8

    def plan_of(q: torch.Tensor, k: torch.Tensor, number: int) -> AnyPlan:
        return plan_for(q, k, patterns[number], layout)

    out, plans = attention_of_each(query, key, value, rows_of_samples(4, 2), plan_of, mask)
    assert plans == [plan_of(query, key, 0), plan_of(query, key, 1)]
    for entry in range(4):
        some = slice(entry, entry + 1)
        one = planned_attention(query[some], key[some], value[some], plans[entry % 2], key_mask=mask[some])
        torch.testing.assert_close(out[some], one)


@pytest.mark.parametrize("pattern", [BlockTopK(keep=0.3), AdaptivePattern(tiles="clusters")])
@pytest.mark.parametrize("mode", ["another default device", "inference mode"])
def test_what_is_chosen_by_content_outlives_the_mode_of_its_call(pattern: Pattern, mode: str) -> None:
    layout = TokenLayout.from_grid((6, 8, 8))
    query, key, value = (torch.randn(1, layout.seqlen, 2, 16) for _ in range(3))
    expected = planned_attention(query, key, value, plan_for(query, key, pattern, layout))
    memory = SiteMemory(step=0)
    with torch.device("meta") if mode == "another default device" else torch.inference_mode():
        plan = plan_for(query, key, pattern, layout, memory=memory)
    wanting = [x.clone().requires_grad_() for x in (query, key, value)]
    out = planned_attention(*wanting, plan)
    torch.testing.assert_close(out, expected)
    out.sum().backward()  # type: ignore[union-attr]
    assert wanting[2].grad is not None
