"""The queue with a model: equalities with stock sampling, order of windows, batches, processes, and a run of any length as a
prefix of a longer."""

import itertools
import multiprocessing
import socket

import pytest
import torch
from fifo_runs import CLIP, denoise, flow_solver, run, unipc_solver

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import (
    Fifo,
    GaussianTail,
    QueueHook,
    WindowAnswer,
    WindowBatch,
    sample_clip,
    start_queue,
)
from genattn.pipelines.long_video.queue.frame_noise import frame_noise
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.queue.window_group import WindowGroup

SHAPES = [
    QueueShape(8, 4),
    QueueShape(8, 4, lookahead=False),
    QueueShape(7, 4, 2),
    QueueShape(3, 4, 3),
    QueueShape(5, 4, 4, False),
]


@pytest.mark.parametrize("make", [flow_solver, unipc_solver], ids=["euler", "unipc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_order_and_batches_equal_parallel_windows(shape, make):
    clip, solver = torch.randn(CLIP), make(shape.num_levels)
    straight, numbers, _ = run(solver, shape, clip, 12)
    in_place, again, _ = run(solver, shape, clip, 12, order="in_place")
    assert numbers == again == list(range(len(numbers)))
    assert torch.equal(straight, in_place)
    for batch in (2, 3, 99):
        torch.testing.assert_close(run(solver, shape, clip, 12, window_batch=batch)[0], straight, rtol=1e-5, atol=1e-6)


def test_latents_per_level_equal_to_the_window_reproduces_a_clip():
    solver, shape = flow_solver(6), QueueShape(6, 4, 4, lookahead=False)
    _, numbers, fifo = run(solver, shape, torch.randn(CLIP), 1)
    # the group that enters next is frames 4..7; a clip sampled on its own from the same noise must come out
    first = fifo.queue.next_number - 4
    entered = fifo.queue.latents[:, :, -4:].clone()
    left = [fifo.tick() for _ in range(6)]
    latents, numbers = left[-1]
    assert numbers == list(range(first, first + 4))
    sample = entered
    for level in reversed(range(6)):
        levels = torch.full((4,), level)
        answer = denoise(WindowBatch(sample, levels[None], torch.arange(4)[None], (slice(0, 4),), (0,))).prediction
        sample, _ = solver.step(sample, answer, levels, {}, None)
    torch.testing.assert_close(latents, sample, rtol=0, atol=1e-6)


def test_a_short_run_is_the_beginning_of_a_long_one():
    solver, shape, clip = flow_solver(8), QueueShape(8, 4), torch.randn(CLIP)
    short, long = run(solver, shape, clip, 9)[0], run(solver, shape, clip, 20)[0]
    assert torch.equal(short, long[:, :, : short.shape[2]])


@pytest.mark.parametrize("make", [lambda n: flow_solver(n, eta=0.7), unipc_solver], ids=["eta", "unipc"])
def test_a_queue_taken_apart_and_put_together_goes_on_to_the_bit(make):
    from genattn.pipelines.long_video.queue.latent_queue import LatentQueue

    solver, shape, clip = make(8), QueueShape(8, 4), torch.randn(CLIP)
    straight, _, _ = run(solver, shape, clip, 14)
    _, _, fifo = run(solver, shape, clip, 6)
    queue = LatentQueue.from_checkpoint(shape, fifo.queue.to_tensors(), fifo.queue.to_numbers())
    again = Fifo(denoise, make(8), queue, seed=7)
    rest = torch.cat([again.tick()[0] for _ in range(8)], 2)
    assert torch.equal(rest, straight[:, :, straight.shape[2] - rest.shape[2] :])


def test_a_frame_gets_fresh_noise_in_every_step(monkeypatch):
    """The same noise twice would add up: an SDE step assumes that each is drawn anew."""
    solver, drawn = flow_solver(8, eta=1.0), []
    step = solver.step

    def watched(sample, prediction, levels, state, noise):
        drawn.append(noise.clone())
        return step(sample, prediction, levels, state, noise)

    monkeypatch.setattr(solver, "step", watched)
    run(solver, QueueShape(8, 4), torch.randn(CLIP), 3)
    for earlier, later in itertools.pairwise(drawn):  # the queue has moved on by one frame
        pairs = zip(earlier[:, :, 1:].unbind(2), later[:, :, :-1].unbind(2))
        likeness = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() for a, b in pairs]
        assert max(likeness) < 0.5  # of 90 values
    everything = torch.stack([frame.flatten() for noise in drawn for frame in noise.unbind(2)])
    assert everything.unique(dim=0).shape[0] == everything.shape[0]


def test_sample_clip_equals_the_stock_loop():
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    sample = frame_noise(3, range(4), torch.zeros(CLIP), purpose="start")
    for i, t in enumerate(scheduler.timesteps):
        levels = torch.full((1, 4), 5 - i)
        answer = denoise(WindowBatch(sample, levels, levels, (slice(0, 4),), (0,))).prediction
        sample = scheduler.step(answer, t, sample).prev_sample
    got = sample_clip(denoise, flow_solver(6), torch.zeros(CLIP), seed=3)
    torch.testing.assert_close(got, sample, rtol=2e-5, atol=2e-5)


def test_sample_clip_with_fresh_noise_is_finite_and_repeatable():
    a, b = (sample_clip(denoise, flow_solver(6, eta=1.0), torch.zeros(CLIP), seed=3) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.isfinite(a).all()


def denoise_and_push(batch):
    return WindowAnswer(denoise(batch).prediction, torch.ones_like(batch.latents))


def test_a_push_moves_the_noise_direction_only():
    solver, shape, clip = flow_solver(8), QueueShape(8, 4), torch.randn(CLIP)
    plain = run(solver, shape, clip, 1)[2].queue
    for order in ("parallel", "in_place"):
        pushed = run(solver, shape, clip, 1, order=order, denoise=denoise_and_push)[2].queue
        gained = (plain.latents - pushed.latents)[0, 0, :, 0, 0]
        sigma = solver.grid.sigma
        # slot s after the tick holds what stood at s + 1: level by level, sigma' * sigma
        want = [float(sigma[level] * sigma[level + 1]) for level in shape.levels[1:].tolist() if level >= 0]
        assert torch.allclose(gained[shape.head - 1 : -1], torch.tensor(want), atol=1e-5)


def test_hooks_see_the_stepped_latents_and_what_leaves():
    seen = {"stepped": 0, "left": []}

    class Watch(QueueHook):
        def after_step(self, fifo, stepped):
            seen["stepped"] += 1
            return stepped

        def on_leave(self, latents, numbers):
            seen["left"] += list(numbers)
            return latents * 0

    out, numbers, fifo = run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 10, hooks=[Watch()])
    assert seen == {"stepped": 10, "left": numbers}
    assert not out.any()
    assert fifo.settings()["hooks"] == [{"hook": "Watch"}]
    hook = QueueHook()
    hook.load({}, {})
    assert (hook.to_tensors(), hook.to_numbers()) == ({}, {})


def test_the_gaussian_tail_is_standard_noise_by_frame_number():
    fifo = run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 1)[2]
    tail = GaussianTail()(fifo, fifo.queue.latents, [40, 41])
    assert torch.equal(tail[:, :, 1:], GaussianTail()(fifo, fifo.queue.latents, [41]))


def test_what_enters_the_queue_is_the_tail_that_was_given():
    class Ramp(GaussianTail):
        def __call__(self, fifo, latents, numbers):
            return torch.tensor(numbers, dtype=latents.dtype)[:, None, None].expand(1, 3, -1, 5, 6)

    fifo = run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 3, tail=Ramp())[2]
    assert (fifo.queue.latents[:, :, -1] == fifo.queue.next_number - 1).all()
    assert isinstance(run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 1)[2].tail, GaussianTail)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"window_batch": 0}, "window_batch must be >= 1"),
        ({"order": "random"}, "order must be"),
        ({"order": "in_place", "window_batch": 2}, "one window at a time"),
    ],
)
def test_wrong_settings_are_refused(extra, message):
    with pytest.raises(GenAttnError, match=message):
        run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 1, **extra)
    with pytest.raises(GenAttnError, match="same levels"):
        Fifo(denoise, flow_solver(7), start_queue(QueueShape(8, 4), flow_solver(8), torch.randn(CLIP)))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def share_windows(rank, mode, clip):
    group = WindowGroup.from_torch()
    shape, calls = QueueShape(6, 4), []

    def watched(batch):
        calls.extend(batch.index)
        if mode == "fail" and rank == 1:
            raise RuntimeError("on purpose")
        return denoise(batch)

    solver = flow_solver(6)
    fifo = Fifo(watched, solver, start_queue(shape, solver, clip, seed=7), seed=7, group=group)
    out, stopped_after = [], None
    for tick in range(10):
        if mode == "stop" and rank == 0 and tick == 3:
            group.ask_to_stop()
        try:
            out.append(fifo.tick()[0])
        except Exception as error:
            # everybody knows already, so this must not send anything
            group.abandon(clip.device, failed=True)
            return f"{type(error).__name__}: {error}"
        if group.stop_agreed:
            stopped_after = tick
            break
    return torch.cat(out, 2).numpy(), sorted(set(calls)), stopped_after


def process(rank, size, port, clip, results):
    import datetime

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    results.put((rank, {mode: share_windows(rank, mode, clip) for mode in ("fail", "stop", "plain")}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def in_two_processes():
    clip = torch.randn(CLIP)
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    workers = [context.Process(target=process, args=(rank, 2, port, clip, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = sorted((results.get(timeout=240) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return clip, [out for _, out in got]


def test_two_processes_share_windows_that_do_not_divide_evenly(in_two_processes):
    # six levels, window 4, stride 2: three windows for two processes
    clip, got = in_two_processes
    alone = run(flow_solver(6), QueueShape(6, 4), clip, 10)[0]
    assert len(QueueShape(6, 4).windows) == 3
    assert [out["plain"][1] for out in got] == [[0, 2], [1]]
    for out in got:
        assert torch.equal(torch.from_numpy(out["plain"][0]), alone)


def test_a_wish_to_stop_reaches_all_processes_at_the_same_tick(in_two_processes):
    assert [out["stop"][2] for out in in_two_processes[1]] == [3, 3]


def test_a_process_that_fails_takes_the_others_along_instead_of_leaving_them_waiting(in_two_processes):
    first, second = (out["fail"] for out in in_two_processes[1])
    assert "1 of 2 processes failed" in first
    assert second == "RuntimeError: on purpose"


def test_a_group_of_one_stops_at_once():
    group = WindowGroup.from_torch()
    assert group.is_main
    assert not group.stop_agreed
    group.ask_to_stop()
    assert group.stop_agreed
