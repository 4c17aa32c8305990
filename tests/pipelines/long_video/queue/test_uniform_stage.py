"""The second stage at uniform noise: one level for all, nothing lost or doubled, and a stopped run goes on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import video_pipes
from fifo_runs import CLIP, denoise, flow_solver, run, unipc_solver
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.long_video.queue.fifo import WindowAnswer
from genattn.pipelines.long_video.queue.latent_queue import CLEAN, QueueShape
from genattn.pipelines.long_video.queue.uniform_stage import UniformStage

SMALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}
FILM = torch.randn(CLIP, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 2), st.booleans())
def test_every_latent_goes_through_once_in_order_beside_clean_ones_at_one_level(window, steps, per_level, lookahead):
    seen = []

    def watch(batch):
        seen.append((batch.levels[0].tolist(), batch.numbers[0].tolist(), batch.keep[0]))
        return denoise(batch)

    stage = UniformStage(watch, window, steps, 6)
    shape = QueueShape(6, 4, per_level, lookahead)
    latents, numbers, fifo = run(flow_solver(6), shape, FILM, 30, hooks=[stage])
    assert numbers == list(range(len(numbers)))
    assert latents.shape[2] == len(numbers) == fifo.passed_on
    assert fifo.queue.first_number + shape.head - len(numbers) == stage.held < stage.block
    blocks = [seen[i : i + steps] for i in range(0, len(seen), steps)]
    assert len(blocks) == len(numbers) // stage.block
    for i, block in enumerate(blocks):
        beside = 0 if i == 0 else min(stage.context, i * stage.block)
        for turn, (levels, told, keep) in enumerate(block):
            assert levels == [CLEAN] * beside + [steps - 1 - turn] * stage.block
            assert told == list(range(i * stage.block - beside, (i + 1) * stage.block))
            assert keep == slice(beside, beside + stage.block)


def test_a_model_that_knows_the_film_gets_it_back():
    truth = torch.randn(1, 3, 40, 5, 6, generator=torch.Generator().manual_seed(1))

    for solver in (flow_solver(6), unipc_solver(6)):

        def knows(batch, grid=solver.grid):
            clean = truth[:, :, batch.numbers[0].clamp(0, 39)]
            return WindowAnswer(grid.prediction_from_clean(batch.latents, clean, batch.levels[0].clamp(min=0)))

        stage = UniformStage(knows, 4, 3, 6)
        latents, numbers, _ = run(solver, QueueShape(6, 4), FILM, 20, hooks=[stage])
        torch.testing.assert_close(latents, truth[:, :, : len(numbers)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("extra", [{}, {"eta": 0.5, "start_as": "condition"}], ids=["plain", "given and eta"])
def test_a_short_film_is_the_beginning_and_a_stopped_run_goes_on_to_the_bit(tmp_path, extra):
    pipe = video_pipes.wan()
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    call = {**SMALL, **extra, "uniform_steps": 2, "start": picture if extra else None}
    straight = long_video(pipe, "a cat", num_frames=33, **call).video
    assert straight.shape[0] == 33
    assert np.array_equal(long_video(pipe, "a cat", num_frames=13, **call).video, straight[:13])
    plain = long_video(pipe, "a cat", num_frames=33, **{**call, "uniform_steps": 0}).video
    assert not np.array_equal(plain, straight)
    assert np.array_equal(plain[0], straight[0]) == bool(extra)
    long_video(pipe, "a cat", num_frames=13, folder=tmp_path, checkpoint_every=1, **call)
    rest = list(long_video(pipe, resume=tmp_path, num_frames=33, stream=True, progress=False))
    assert np.array_equal(np.stack(rest), straight[13:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uniform_steps": 5}, "uniform_steps must be 1 to the queue's 4 levels, got 5"),
        ({"uniform_steps": -1}, "uniform_steps must be >= 0"),
        ({"uniform_steps": 1, "window": 1, "lookahead": False}, "needs a window of >= 2 latents"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(GenAttnError, match=message):
        long_video(video_pipes.wan(), "a cat", num_frames=9, **{**SMALL, **settings})


def test_a_block_half_full_goes_on_where_it_began():
    fifo = SimpleNamespace(solver=flow_solver(6), seed=0)
    first, second = (UniformStage(denoise, 3, 2, 6) for _ in range(2))
    _, numbers = first.pass_on(fifo, FILM[:, :, :3], [5, 6, 7])
    assert (numbers, first.held) == ([5, 6], 1)
    second.load(first.to_tensors(), first.to_numbers())
    (latents, numbers), (again, same) = (stage.pass_on(fifo, FILM[:, :, 3:4], [8]) for stage in (first, second))
    assert numbers == same == [7, 8]
    assert torch.equal(latents, again)
