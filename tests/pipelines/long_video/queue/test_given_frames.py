"""Given frames as a condition: they come out as they were given, the model continues them, and a stopped run goes on."""

import numpy as np
import pytest
import torch
import video_pipes
from fifo_runs import CLIP, denoise, flow_solver, run

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
from genattn.pipelines.long_video.queue.given_frames import GivenFrames
from genattn.pipelines.long_video.queue.latent_queue import CLEAN, QueueShape
from genattn.pipelines.long_video.start_frames import given_latents

SMALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}
PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe():
    return video_pipes.wan_ti2v()


def test_given_latents_stand_clean_in_every_window_and_leave_as_they_came():
    seen = []

    def watch(batch):
        for row in range(len(batch.levels)):
            for place in range(batch.levels.shape[1]):
                number = int(batch.numbers[row, place])
                seen.append((number, int(batch.levels[row, place]), batch.latents[row, :, place].clone()))
        return denoise(batch)

    clip = torch.randn(CLIP, generator=torch.Generator().manual_seed(0))
    given = torch.randn(1, 3, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    hook = GivenFrames(watch, given, 4)
    latents, numbers, _ = run(flow_solver(6), QueueShape(6, 4), clip, 14, denoise=hook, hooks=[hook])
    assert numbers[:2] == [0, 1]
    assert torch.equal(latents[:, :, :2], given)
    assert not torch.equal(latents[:, :, 2:4], given)
    assert any(number >= 2 for number, _, _ in seen)
    for number, level, latent in seen:
        if number < 2:
            assert level == CLEAN
            assert torch.equal(latent, given[0, :, max(number, 0)])
        elif number > 6:
            # numbers that came in as noise: their own level, not a given one
            assert level >= CLEAN
    assert hook.settings() == {"hook": "given", "latents": 2}


@pytest.mark.parametrize("count", [0, 4])
def test_given_frames_must_leave_a_window_room(count):
    with pytest.raises(GenAttnError, match="given frames must be 1 to 3 latents"):
        GivenFrames(denoise, torch.zeros(1, 3, count, 5, 6), 4)


@pytest.mark.parametrize("extra", [{}, {"ouroboros": Ouroboros(memory_frames=2, memory_spacing=1), "drift_correction": 0.5}])
def test_a_film_begins_with_the_picture_and_a_stopped_run_goes_on_to_the_bit(pipe, tmp_path, extra):
    straight = long_video(pipe, "a cat", num_frames=33, start=PICTURE, **SMALL, **extra).video
    short = long_video(pipe, "a cat", num_frames=9, start=PICTURE, **SMALL, **extra).video
    assert np.array_equal(short, straight[:9])
    base = frame_denoiser(pipe)
    with torch.no_grad():
        first = base.decoder().push(base.to_vae(given_latents(base, PICTURE, (32, 32))))
    wanted = ((first[0, :, 0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert np.array_equal(straight[0], wanted)
    long_video(pipe, "a cat", num_frames=1, start=PICTURE, folder=tmp_path, checkpoint_every=1, **SMALL, **extra)
    rest = list(long_video(pipe, resume=tmp_path, num_frames=33, stream=True, progress=False))
    assert np.array_equal(np.stack(rest), straight[1:])


def test_the_picture_is_a_condition_where_asked_and_a_beginning_elsewhere():
    pipe = video_pipes.wan()
    call = {"num_frames": 9, "start": PICTURE, **SMALL}
    loose = long_video(pipe, "a cat", **call).video
    tight = long_video(pipe, "a cat", start_as="condition", **call).video
    assert np.array_equal(loose, long_video(pipe, "a cat", start_as="renoise", **call).video)
    assert not np.array_equal(loose, tight)
    clip = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert long_video(pipe, "a cat", num_frames=9, start=clip, start_as="condition", **SMALL).frames == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "WanImageToVideoPipeline continues given frames; pass start="),
        ({"start_as": "condition", "start": None}, "continues given frames"),
        ({"start": PICTURE, "start_as": "both"}, "start_as must be 'renoise' or 'condition'"),
        ({"start": torch.zeros(9, 3, 32, 32)}, "given frames must be 1 to 2 latents"),
        ({"start": torch.zeros(4, 3, 32, 32)}, "nearest are"),
    ],
)
def test_what_cannot_be_continued_is_refused(pipe, settings, message):
    with pytest.raises(GenAttnError, match=message):
        long_video(pipe, "a cat", num_frames=9, **SMALL, **settings)


def test_a_way_to_start_without_a_start_is_refused():
    with pytest.raises(GenAttnError, match="says what to do with start, and none was given"):
        long_video(video_pipes.wan(), "a cat", num_frames=9, start_as="condition", **SMALL)
