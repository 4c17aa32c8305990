"""Prompt schedules: what is read, what is refused, and how two prompts cross-fade."""

import pytest
import torch
from hypothesis import given, strategies as st

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule


def test_text_forms():
    schedule = PromptSchedule.parse('0:"a red circle" 120:"it turns \\"blue\\""', fade=8)
    assert schedule.starts == (0, 120)
    assert schedule.prompts == ("a red circle", 'it turns "blue"')
    assert PromptSchedule.parse("0:'a', 5:'b'").prompts == ("a", "b")
    assert PromptSchedule.parse({0: "a", 9: "b"}).starts == (0, 9)
    assert PromptSchedule.parse(schedule) is schedule
    # a prompt that merely holds a number and a colon is a prompt
    assert PromptSchedule.parse("at 10:30 a cat").prompts == ("at 10:30 a cat",)


@given(st.lists(st.tuples(st.integers(1, 999), st.text(min_size=1)), min_size=1, max_size=4, unique_by=lambda e: e[0]))
def test_text_form_round_trip(entries):
    entries = [(0, "first"), *sorted(entries)]
    schedule = PromptSchedule(tuple(k for k, _ in entries), tuple(v for _, v in entries))
    assert PromptSchedule.parse(schedule.to_text()) == schedule


@given(st.integers(0, 30), st.lists(st.integers(-5, 300), min_size=1, max_size=9), st.floats(0, 1))
def test_weights_are_shares(fade, frames, share):
    schedule = PromptSchedule((0, 60, 120), ("a", "b", "c"), fade)
    weights = schedule.weights(torch.tensor(frames), torch.full((len(frames),), share))
    assert torch.allclose(weights.sum(-1), torch.ones(len(frames), dtype=torch.float64))
    assert (weights >= 0).all()
    for frame, row in zip(frames, weights):
        near = [s for s in (60, 120) if s - fade < frame < s + fade]
        if not near:
            assert row.max() == 1
            assert schedule.prompts[int(row.argmax())] == schedule.active(frame)


def test_noisy_latents_follow_the_new_prompt_first():
    schedule = PromptSchedule((0, 100), ("old", "new"), 20)
    at = torch.full((3,), 100)
    new = schedule.weights(at, torch.tensor([0.0, 0.5, 1.0]))[:, 1]
    assert new.tolist() == [0.0, 0.5, 1.0]
    assert schedule.weights(torch.tensor([80, 120]), torch.tensor([1.0, 0.0]))[:, 1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("prompt", "fade", "message"),
    [
        ('0:"a" 50:"b" 20:"c"', 0, "must rise, got 0, 50, 20"),
        ('5:"a"', 0, "must begin at frame 0, got 5"),
        ('0:"a" then "b"', 0, "at character 6"),
        ('0:"a" 4:"b"', 9, "fade must not exceed the 4 frames"),
        ({0: "a", 4: "b"}, -1, "fade must be >= 0"),
        ("  ", 0, "must be a text or a schedule"),
        (7, 0, "must be a text or a schedule"),
        ({}, 0, "as many frames as prompts"),
    ],
)
def test_what_makes_no_schedule_is_refused(prompt, fade, message):
    with pytest.raises(GenAttnError, match=message):
        PromptSchedule.parse(prompt, fade)
