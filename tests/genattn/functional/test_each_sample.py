"""Which entries of a batch belong to one sample, and that each group is answered by its own plan."""

import pytest
import torch

import genattn
from genattn import NeighborhoodPattern, TokenLayout
from genattn.functional.dispatch import attention
from genattn.functional.each_sample import attention_of_each, rows_of_samples
from genattn.functional.planned import AnyPlan, plan_for, planned_attention
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.pattern import Pattern, SiteMemory
from genattn.pipelines.tiny.random import build_inputs, build_model


@pytest.mark.parametrize(
    ("batch", "samples", "passes", "wanted"),
    [
        (4, 2, None, [[0, 2], [1, 3]]),  # [uncond; cond] of two samples
        (6, 2, None, [[0, 2, 4], [1, 3, 5]]),
        (12, 2, 2, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]),  # three frames folded in behind the samples
        (6, 3, 1, [[0, 1], [2, 3], [4, 5]]),
        (4, 1, None, [[0, 1, 2, 3]]),
        (3, None, None, [[0], [1], [2]]),
        (3, 2, None, [[0], [1], [2]]),  # does not divide: nothing is guessed
        (6, 2, 2, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_entries_of_a_sample(batch: int, samples: int | None, passes: int | None, wanted: list[list[int]]) -> None:
    assert [rows.tolist() for rows in rows_of_samples(batch, samples, passes)] == wanted


def test_every_group_is_answered_by_its_own_plan() -> None:
    layout = TokenLayout.from_grid((4, 6))
    patterns = NeighborhoodPattern((2, 2)), NeighborhoodPattern((4, 3))
    query, key, value = (torch.randn(4, layout.seqlen, 2, 16) for _ in range(3))
    mask = torch.rand(4, layout.seqlen) < 0.8

    def plan_of(q: torch.Tensor, k: torch.Tensor, keys: torch.Tensor | None, number: int) -> AnyPlan:
        assert keys is None or torch.equal(keys, mask[number::2])
        return plan_for(q, k, patterns[number], layout)

    out, plans = attention_of_each(query, key, value, rows_of_samples(4, 2), plan_of, mask)
    assert plans == [plan_of(query, key, None, 0), plan_of(query, key, None, 1)]
    assert isinstance(out, torch.Tensor)
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


@pytest.mark.parametrize("pattern", [BlockTopK(keep=0.3), AdaptivePattern(tiles="clusters"), AdaptivePattern("top-p")])
@pytest.mark.parametrize("masked", [False, True])
def test_an_entry_of_a_plain_call_is_as_alone(pattern: Pattern, masked: bool) -> None:
    layout = TokenLayout.from_grid((6, 8, 8))
    query, key, value = (torch.randn(3, layout.seqlen, 2, 16) for _ in range(3))
    query[1], key[2] = 8 * query[1], 8 * key[2]  # one chooses quite otherwise than the others
    mask = torch.rand(3, layout.seqlen) < 0.8 if masked else None
    flags = {"return_lse": not masked}
    found = attention(query, key, value, pattern, layout, key_mask=mask, **flags)
    for entry in range(3):
        one = slice(entry, entry + 1)
        own = None if mask is None else mask[one]
        alone = attention(query[one], key[one], value[one], pattern, layout, key_mask=own, **flags)
        for some, wanted in zip(found, alone, strict=True) if not masked else [(found, alone)]:
            torch.testing.assert_close(some[one], wanted)


@pytest.mark.parametrize("pattern", [BlockTopK(keep=0.3), AdaptivePattern(tiles="clusters")])
def test_a_bare_models_entries_choose_for_themselves(pattern: Pattern) -> None:
    model = build_model("wan").double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in build_inputs("wan").items() if torch.is_tensor(x)}
    two = {name: torch.cat([x, x.flip(1) if x.is_floating_point() else x]) for name, x in inputs.items()}
    with genattn.apply(model, pattern, dense_steps=0, dense_layers=0) as handle, torch.no_grad():
        both = model(**two, return_dict=False)[0]
        alone = [model(**{name: x[n : n + 1] for name, x in two.items()}, return_dict=False)[0] for n in range(2)]
        assert handle.report().sparse_calls > 0
    torch.testing.assert_close(both, torch.cat(alone))


def test_a_bare_model_at_one_step_keeps_nothing_of_other_samples() -> None:
    pattern = AdaptivePattern(tiles="clusters", refresh_every=3)
    model, inputs = build_model("wan"), build_inputs("wan")
    others = [{**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])} for _ in range(6)]
    with torch.no_grad():
        with genattn.apply(model, pattern, dense_steps=0, dense_layers=0):
            alone = model(**others[5], return_dict=False)[0]
        with genattn.apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
            for some in others[:5]:
                model(**some, return_dict=False)
            found = model(**others[5], return_dict=False)[0]
            (plugin,) = handle.plugins
            assert len(plugin._memory) == len(handle.report().sites)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, alone)
