"""Decay and a pattern on the same model: the plan carries the decay, and what the pattern leaves dense is decayed by frames."""

import math

import pytest
import torch
from long_clips import Watch, answer, longer, reference

import genattn
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.pipelines.long_clip.logit_decay import LogitDecay
from genattn.pipelines.tiny.random.build import build_model
from genattn.selection.rules import TopK

RADIAL = genattn.RadialPattern(decay=0.3)
ALWAYS = {"dense_steps": 0, "dense_layers": 0}


def ran(model, inputs, *plugins, apart=False, **settings):
    """(answer, report), plugins applied together, or one after the other."""
    given = {**ALWAYS, **settings} if any(isinstance(p, genattn.Pattern) for p in plugins) else settings
    if not apart:
        with genattn.apply(model, *plugins, **given) as handle:
            return answer(model, inputs), handle.report()
    handles = [genattn.apply(model, p, **(given if isinstance(p, genattn.Pattern) else {})) for p in plugins]
    out, report = answer(model, inputs), handles[-1].report()
    for handle in handles:
        handle.remove()
    return out, report


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
@pytest.mark.parametrize("numbers", [(2, 0.5), (2, 1.0, 1.5), (2, 0.8, math.inf)])
def test_either_order_is_the_wrapped_pattern(family, numbers):
    model, inputs = build_model(family), longer(family, 6)
    stock = answer(model, inputs)
    wanted, report = ran(model, inputs, LogitDecayed(RADIAL, *numbers))
    assert report.sparse_calls == report.calls > 0
    for plugins in ((RADIAL, LogitDecay(*numbers)), (LogitDecay(*numbers), RADIAL)):
        for apart in (False, True):
            got, report = ran(model, inputs, *plugins, apart=apart)
            assert torch.equal(got, wanted)
            assert report.sparse_calls == report.calls
    for alone in (RADIAL, LogitDecay(*numbers)):
        assert not torch.equal(ran(model, inputs, alone)[0], wanted)
    assert torch.equal(answer(model, inputs), stock)


def test_over_a_dense_pattern_every_call_is_the_definition():
    model, inputs = build_model("wan"), longer("wan", 6)
    plugin, watch = LogitDecay(2, 0.5, 0.3), Watch()
    with genattn.apply(model, watch, LogitDecayed(genattn.DensePattern(), 2, 0.5, 0.3), **ALWAYS):
        answer(model, inputs)
    assert watch.calls
    for call, out in watch.calls:
        assert call.record.sparse
        wanted = reference(call.query, call.key, call.value, call.layout, call.scale, plugin, call.mask)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [{"dense_layers": 99}, {"impl": "auto", "dense_steps": 99}])
def test_what_the_pattern_leaves_dense_is_decayed_by_frames(left):
    model, inputs = build_model("wan"), longer("wan", 6)
    plain, _ = ran(model, inputs, LogitDecay(2, 0.5))
    for plugins in ((RADIAL, LogitDecay(2, 0.5)), (LogitDecay(2, 0.5), RADIAL)):
        got, report = ran(model, inputs, *plugins, **left)
        assert report.sparse_calls == 0
        assert torch.equal(got, plain)


def test_layers_may_be_dense_or_sparse():
    model, inputs = build_model("wan"), longer("wan", 6)
    watch, plugin = Watch(), LogitDecay(2, 0.5)
    with genattn.apply(model, watch, RADIAL, plugin, dense_steps=0, dense_layers=1):
        answer(model, inputs)
    assert [call.record.sparse for call, _ in watch.calls] == [False, *[True] * (len(watch.calls) - 1)]
    call, out = watch.calls[0]
    wanted = reference(call.query, call.key, call.value, call.layout, call.scale, plugin, call.mask)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


def test_switched_off_it_asks_for_nothing():
    model, inputs = build_model("wan"), longer("wan", 6)
    plain, _ = ran(model, inputs, RADIAL)
    with (
        genattn.apply(model, RADIAL, **ALWAYS),
        genattn.apply(model, LogitDecay(2, 0.5)) as decay,
        decay.options(enabled=False),
    ):
        assert torch.equal(answer(model, inputs), plain)


def test_a_clip_of_the_trained_length_is_that_of_the_pattern_alone():
    model, inputs = build_model("wan"), longer("wan", 3)
    assert torch.equal(ran(model, inputs, RADIAL, LogitDecay(3))[0], ran(model, inputs, RADIAL)[0])


def test_a_pattern_by_content_and_guidance_outside():
    """SoftPAG edits what the decayed pattern answers."""
    model, inputs = build_model("wan"), longer("wan", 6)
    adaptive = AdaptivePattern(TopK(0.5))
    wanted, _ = ran(model, inputs, LogitDecayed(adaptive, 2, 0.5))
    assert torch.equal(ran(model, inputs, LogitDecay(2, 0.5), adaptive)[0], wanted)
    watch, guided = Watch(), SoftPAG("L1H0", u=0.5, scale=0.0)
    got, _ = ran(model, inputs, guided, watch, LogitDecay(2, 0.5), RADIAL)
    assert all(call.record.sparse for call, _ in watch.calls)
    torch.testing.assert_close(got, ran(model, inputs, LogitDecayed(RADIAL, 2, 0.5))[0])


def test_a_batch_of_grids_that_differ_is_decayed_sample_by_sample():
    """A call without a layout of its own still tells the pattern, which cuts it into samples."""
    layouts = tuple(genattn.TokenLayout.from_grid(grid) for grid in ((6, 2, 2), (5, 2, 2)))
    run = genattn.seam.plugin.Run(sample_layouts=layouts)
    tensors = torch.randn(3, 2, 24, 2, 8)
    site = type("Site", (), {"name": "a"})()
    call = genattn.seam.plugin.AttentionCall(*tensors, None, None, False, False, site, run, None)
    assert LogitDecay(2, 0.5).decay_at(call) == LogitDecay(2, 0.5).asked
    assert LogitDecay(2, 0.5).decay_at(call.with_tensors(is_causal=True)) is None
    assert LogitDecay(2, 0.5).decay_at(call.with_tensors(run=genattn.seam.plugin.Run())) is None
