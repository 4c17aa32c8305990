"""Rotating anchors: the mask of every step, their turn, and how steps reach a stock model."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn.errors import GenAttnError
from genattn.kernels.reference.attention import visible_mask
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import pattern_from_dict, pattern_to_dict
from genattn.patterns.combine import PerHead, PerLayer, Union
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.pipelines.tiny.random.build import build_pipeline

WINDOW = NeighborhoodPattern((3, -1, -1))


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.integers(1, 12), st.integers(0, 30), st.integers(0, 4))
def test_anchors_see_and_are_seen_by_all_and_the_rest_keeps_its_window(frames, stride, step, text):
    layout = genattn.TokenLayout.from_grid((frames, 2, 2), text_before=text)
    pattern = RotatingAnchors(WINDOW, stride).for_step(step)
    frame = torch.where(layout.raster_index >= 0, layout.raster_index // 4, -1)
    anchor = (frame >= 0) & (frame % stride == step % stride)
    wanted = WINDOW.mask(layout) | anchor[:, None] | anchor[None]
    assert torch.equal(pattern.mask(layout), wanted)
    plan = pattern.plan(layout, 4, 4)
    assert torch.equal(visible_mask(plan)[0], wanted)


def test_every_frame_has_been_an_anchor_after_one_turn():
    layout = genattn.TokenLayout.from_grid((9, 2, 2))
    pattern = RotatingAnchors(WINDOW, 4, offset=1)
    turn = [pattern.for_step(step).fixed(layout).frames for step in range(4)]
    assert sorted(frame for frames in turn for frame in frames) == list(range(9))
    assert turn[0] == (1, 5)
    assert pattern.for_step(-1) == pattern
    assert pattern.for_step(4) == pattern


def test_steps_reach_inner_patterns_everywhere():
    moving = RotatingAnchors(WINDOW, 4)
    at_two = moving.for_step(2)
    assert GlobalTokens(moving, (0,)).for_step(2) == GlobalTokens(at_two, (0,))
    assert Union(moving, WINDOW).for_step(2) == Union(at_two, WINDOW)
    assert PerHead((moving, WINDOW)).for_step(2) == PerHead((at_two, WINDOW))
    assert PerLayer((moving, WINDOW)).for_layer(0, 2).for_step(2) == at_two
    assert RotatingAnchors(moving, 2).for_step(1) == RotatingAnchors(moving.for_step(1), 2, 1)
    assert AdaptivePattern(inside=moving, always=moving).for_step(2) == AdaptivePattern(inside=at_two, always=at_two)
    assert WINDOW.for_step(3) is WINDOW
    assert moving.for_layer(0, 2) == moving
    assert moving.for_heads(0, 2) == moving


def test_a_stock_model_gets_other_anchors_in_every_step():
    pipe, call = build_pipeline("wan")
    wide = {"num_frames": 29, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    seen = []
    asked = RotatingAnchors.for_step

    class Told(RotatingAnchors):
        def for_step(self, step=-1, fraction=None):
            seen.append(step)
            return asked(self, step, fraction)

    with genattn.apply(pipe, Told(WINDOW, 4), dense_steps=0, dense_layers=0) as handle:
        pipe(**{**call, **wide, "generator": torch.Generator().manual_seed(0)})
        assert handle.report().sparse_calls == handle.report().calls > 0
    assert set(seen) == {0, 1, 2}


def test_it_is_saved_and_wrong_settings_are_refused():
    pattern = RotatingAnchors(WINDOW, 4, 1)
    assert pattern_from_dict(pattern_to_dict(pattern)) == pattern
    with pytest.raises(GenAttnError, match="stride must be a number of frames >= 1, got 0"):
        RotatingAnchors(WINDOW, 0)
    with pytest.raises(GenAttnError, match="offset must be 0 to stride - 1 = 3"):
        RotatingAnchors(WINDOW, 4, 4)


AROUND = {
    "anchors": lambda pattern: RotatingAnchors(pattern, 2),
    "global": lambda pattern: GlobalTokens(pattern, (0,)),
    "anchors in global": lambda pattern: GlobalTokens(RotatingAnchors(pattern, 3), (0,)),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_the_inner_patterns_tail_is_the_whole_ones(around):
    layout, inner = genattn.TokenLayout.from_grid((6, 8, 8)), genattn.RadialPattern(decay=0.1, tail="mean2")
    assert around(inner).plan(layout, 16, 16).tail.kind == "mean2"
    assert around(inner).with_measured_tail().plan(layout, 16, 16).tail.kind == "mean2"
    assert Union(around(inner), WINDOW).plan(layout, 16, 16).tail.kind == "mean2"
    assert around(inner).with_tail(None).plan(layout, 16, 16).tail is None
    assert around(inner).measured_tail == Union(around(inner), WINDOW).measured_tail == "mean2"
    assert around(WINDOW).measured_tail == Union(around(WINDOW), inner).measured_tail == WINDOW.measured_tail
    assert around(WINDOW.with_tail(None)).measured_tail is None
    per_head = around(PerHead((genattn.RadialPattern(decay=0.1, tail=None), inner)))
    for pattern in (per_head, per_head.with_measured_tail(), Union(per_head, WINDOW).with_measured_tail()):
        assert pattern.tail_of_heads() == (None, "mean2")


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_the_inner_pattern_cannot_be_is_refused(around):
    with pytest.raises(GenAttnError, match="needs a pattern of geometry alone inside.*got AdaptivePattern"):
        around(AdaptivePattern())
    with pytest.raises(GenAttnError, match="needs a pattern of geometry alone inside.*got 3"):
        around(3)
    with pytest.raises(GenAttnError, match="a causal axis hides them on purpose"):
        around(NeighborhoodPattern(3, is_causal=(True, False, False))).with_tail("mean")
    with pytest.raises(GenAttnError, match="tail must be None or one of"):
        around(WINDOW).with_tail("median")
