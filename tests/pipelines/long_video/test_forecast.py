"""What is told of a film's cost before it starts is what it then costs."""

import itertools
import re
from typing import Any

import pytest
import torch

from genattn.pipelines.long_video.forecast import Forecast, duration
from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.long_video.queue.latent_queue import LatentQueue, QueueShape
from genattn.pipelines.tiny.random.build import build_pipeline

SHAPES = [(8, 4, 1, True), (8, 4, 1, False), (5, 4, 2, True), (3, 6, 4, False), (2, 5, 5, False)]


@pytest.mark.parametrize(("levels", "window", "width", "lookahead"), SHAPES)
def test_calls_are_those_of_the_queue(levels: int, window: int, width: int, lookahead: bool) -> None:
    shape = QueueShape(levels, window, width, lookahead)
    for clip_latents, sampled in ((min(window, shape.working), True), (1, False), (shape.working, False)):
        forecast = Forecast(shape, clip_latents, sampled, 4)
        queue = LatentQueue.start(shape, torch.zeros(1, 1, clip_latents, 1, 1), lambda clean, levels, numbers: clean)
        calls, left, first = levels if sampled else 0, 0, None
        for _ in range(20):
            calls += len(shape.windows)
            tail = torch.zeros(1, 1, width, 1, 1)
            left += len(queue.advance(queue.latents, {}, tail)[1])
            if left:
                first = first or calls
                assert forecast.calls_for(left) == calls
        assert forecast.calls_for(1) == first
        assert forecast.calls_per_frame == len(shape.windows) / width / 4
        assert Forecast(shape, clip_latents, sampled, 4, processes=99).calls_per_frame == 1 / width / 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("more", [{}, {"uniform_steps": 2}, {"lookahead": False}])
def test_a_film_costs_what_was_told(more: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pipe = build_pipeline("wan")[0]
    count = itertools.count(1)
    calls = 0

    def counting(module: Any, args: Any) -> None:
        nonlocal calls
        calls = next(count)

    pipe.transformer.register_forward_pre_hook(counting)
    settings = {"height": 32, "width": 32, "window": 4, "num_inference_steps": 4, "guidance_scale": 1.0, "num_frames": 17}
    film = long_video(pipe, "a cat", stream=True, **settings, **more)
    told = re.search(
        r"long video: (\d+) model calls before the first frame, then (\S+) a frame; (\d+) in all", capsys.readouterr().err
    )
    assert told
    frames = iter(film)
    next(frames)
    assert calls == int(told[1])
    for _ in frames:
        pass
    assert calls == int(told[3])


def test_time_is_told_once_after_the_second_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    step = Forecast(QueueShape(8, 4), 4, True, 4, latents=5).timed(lines.append)
    step(1)
    assert lines == []
    step(2)
    step(3)
    assert len(lines) == 1
    assert re.fullmatch(r"first frame after about 1 s, then \S+ s a frame; the film in about 1 s", lines[0])


def test_words() -> None:
    forecast = Forecast(QueueShape(8, 4, 1, False), 4, True, 4, latents=5)
    assert forecast.words() == "18 model calls before the first frame, then 0.5 a frame; 26 in all"
    assert forecast.words(60.0) == "first frame after about 18 min 0 s, then 30 s a frame; the film in about 26 min 0 s"
    assert Forecast(QueueShape(8, 4, 1, False), 4, True, 4).words() == "18 model calls before the first frame, then 0.5 a frame"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"),
        (59, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1.0 h"),
        (86399, "24.0 h"),
        (86400, "1.0 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
