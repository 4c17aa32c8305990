"""A whole run in two processes: the same film as in one, and nobody waits for a process that failed or left."""

import datetime
import errno
import multiprocessing
import socket

import numpy as np
import pytest
import torch
import video_pipes

from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.long_video.output import checkpoint as queue_checkpoint

# five levels, window 3, stride 2: three windows for two processes
CALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 5, "guidance_scale": 1.0, "progress": False}
FRAMES, LONGER = 21, 33


def same_film(pipe, rank, folder):
    return long_video(pipe, "a cat", num_frames=FRAMES, window_batch=2, **CALL)


def one_model_fails(pipe, rank, folder):
    video = long_video(pipe, "a cat", num_frames=FRAMES, folder=folder, checkpoint_every=1, stream=True, **CALL)
    forward, calls = pipe.transformer.forward, []

    def fail_later(*args, **kwargs):
        calls.append(rank)
        if rank == 1 and len(calls) > 6:
            raise RuntimeError("on purpose")
        return forward(*args, **kwargs)

    pipe.transformer.forward = fail_later
    try:
        return video.run()
    finally:
        del pipe.transformer.forward


def resumed(pipe, rank, folder):
    list_of_frames = list(long_video(pipe, resume=folder, num_frames=LONGER, stream=True, progress=False))
    return np.stack(list_of_frames) if list_of_frames else None


def the_folder_is_taken(pipe, rank, folder):
    return long_video(pipe, "a cat", num_frames=FRAMES, folder=folder, **CALL)


def the_disk_is_full(pipe, rank, folder):
    video = long_video(pipe, "a cat", num_frames=FRAMES, output=folder / "full.mp4", stream=True, **CALL)
    if rank == 0:

        def refuse(frame):
            raise OSError(errno.ENOSPC, "No space left on device")

        video.parts.writer.write = refuse
    return video.run()


def one_leaves_early(pipe, rank, folder):
    video = long_video(pipe, "a cat", num_frames=LONGER, stream=True, **CALL)
    for i, _ in enumerate(video):
        if i == 4:
            break
    return video.stopped


PARTS = [same_film, one_model_fails, resumed, the_folder_is_taken, the_disk_is_full, one_leaves_early, same_film]


def process(rank, port, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    pipe, out = video_pipes.wan(), []
    for part in PARTS:
        try:
            made = part(pipe, rank, folder)
            out.append(getattr(made, "video", made))
        except Exception as error:
            out.append(f"{type(error).__name__}: {error}")
    results.put((rank, out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def got(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("run")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=process, args=(rank, port, folder, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    both = [out for _, out in sorted((results.get(timeout=240) for _ in workers), key=lambda item: item[0])]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return both, folder


@pytest.fixture(scope="module")
def alone():
    return long_video(video_pipes.wan(), "a cat", num_frames=LONGER, **CALL).video


def test_two_processes_make_the_film_of_one(got, alone):
    (first, second), _ = got
    for part in (0, -1):
        assert np.array_equal(first[part], alone[:FRAMES])
        assert second[part] is None


def test_a_process_whose_model_fails_stops_both_and_the_checkpoint_goes_on_in_both(got, alone):
    (first, second), folder = got
    assert first[1] == "GenAttnError: 1 of 2 processes failed; see their output (this is rank 0)"
    assert second[1] == "RuntimeError: on purpose"
    kept = LONGER - len(first[2])
    assert 0 < kept < FRAMES
    assert np.array_equal(first[2], alone[kept:])
    assert second[2] is None
    assert queue_checkpoint.read_record(folder)["frames"] == LONGER


def test_a_main_process_that_cannot_start_or_write_tells_the_other(got):
    (first, second), _ = got
    assert "already holds a run" in first[3]
    assert "No space left on device" in first[4]
    for part in (3, 4):
        assert second[part] == "GenAttnError: 1 of 2 processes failed; see their output (this is rank 1)"


def test_leaving_the_stream_in_one_process_ends_the_others_without_an_error(got):
    (first, second), _ = got
    assert (first[5], second[5]) == ("left early", "interrupted")
