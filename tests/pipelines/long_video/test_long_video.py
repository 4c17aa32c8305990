"""A whole run: file and frames agree, a stopped run goes on to the bit however it was stopped, and what cannot be is refused
first."""

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import video_pipes

from genattn.errors import GenAttnError
from genattn.pipelines.long_video import run as long_video_run
from genattn.pipelines.long_video.generate import long_video, resume_video
from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
from genattn.pipelines.long_video.output import checkpoint as queue_checkpoint
from genattn.pipelines.long_video.run_stop import StopRequest
from genattn.pipelines.long_video.settings import LongVideoSettings
from genattn.seam.report import GenAttnWarning

ROOT = Path(__file__).resolve().parents[3]

SMALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}
FULL = {**SMALL, "guidance_scale": 2.0, "negative_prompt": "bad"}


@pytest.fixture(scope="module")
def pipe():
    return video_pipes.wan()


def film(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_frames_come_as_an_array_a_stream_and_a_file(pipe, tmp_path):
    array = long_video(pipe, "a cat", num_frames=25, **FULL)
    assert array.video.shape == (25, 32, 32, 3)
    assert (array.frames, array.made, array.stopped) == (25, 25, None)
    assert array.fps > 0
    assert set(array.drift) >= {"brightness", "contrast", "log_sharpness", "latent_std"}
    streamed = list(long_video(pipe, "a cat", num_frames=25, stream=True, **FULL))
    assert np.array_equal(np.stack(streamed), array.video)
    filed = long_video(pipe, "a cat", num_frames=25, output=tmp_path / "a.mp4", **FULL)
    assert filed.video is None
    assert np.abs(film(filed.path).astype(int) - array.video).mean() < 12
    assert len(film(filed.path)) == 25


def test_a_short_film_is_the_beginning_of_a_long_one_and_the_seed_matters(pipe):
    short = long_video(pipe, "a cat", num_frames=9, **SMALL).video
    long = long_video(pipe, "a cat", num_frames=33, **SMALL).video
    assert np.array_equal(short, long[:9])
    assert not np.array_equal(short, long_video(pipe, "a cat", num_frames=9, seed=1, **SMALL).video)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"eta": 0.5, "latents_per_level": 2},
        {
            "ouroboros": Ouroboros(subject="cat", guidance=0.1, memory_frames=2, memory_spacing=1, resample=2),
            "drift_correction": 0.5,
        },
    ],
    ids=["fifo", "eta-zigzag", "ouroboros"],
)
def test_a_resumed_run_gives_the_same_frames_to_the_bit(pipe, tmp_path, extra):
    straight = long_video(pipe, "a cat", num_frames=49, **SMALL, **extra)
    first = long_video(pipe, "a cat", num_frames=21, folder=tmp_path, checkpoint_every=2, **SMALL, **extra)
    assert first.frames == 21
    frames = list(long_video(pipe, resume=tmp_path, num_frames=49, stream=True, progress=False))
    assert np.array_equal(np.stack(frames), straight.video[21:])
    whole = film(tmp_path / "video.mp4")
    assert len(whole) == 49
    done = long_video(pipe, resume=tmp_path, progress=False)
    assert (done.frames, done.made) == (49, 0)
    assert len(list(tmp_path.glob("state-*.safetensors"))) == 1


def test_leaving_the_stream_early_keeps_a_whole_film_and_a_checkpoint(pipe, tmp_path):
    video = long_video(pipe, "a cat", folder=tmp_path, stream=True, **SMALL)
    for i, _ in enumerate(video):
        if i == 10:
            break
    assert video.stopped == "left early"
    frames = len(film(tmp_path / "video.mp4"))
    assert frames == video.frames >= 11
    straight = long_video(pipe, "a cat", num_frames=frames + 8, **SMALL).video
    rest = list(long_video(pipe, resume=tmp_path, num_frames=frames + 8, stream=True, progress=False))
    assert np.array_equal(np.stack(rest), straight[frames:])


def test_prompts_switch_in_mid_stream(pipe):
    plain = long_video(pipe, "a cat", num_frames=41, **SMALL).video
    for blend in ("embeds", "prediction"):
        text = {0: "a cat", 20: "a very different dog"}
        switched = long_video(pipe, text, num_frames=41, prompt_fade=4, prompt_blend=blend, **SMALL).video
        # latent n holds frames up to 4 n; those that never shared a window with frame 16 or later are untouched
        assert np.array_equal(switched[0], plain[0])
        assert not np.array_equal(switched[-1], plain[-1])


def test_a_picture_and_a_video_begin_the_film(pipe):
    from PIL import Image

    picture = np.full((32, 32, 3), 90, np.uint8)
    by_array = long_video(pipe, "a cat", num_frames=9, start=picture, **SMALL).video
    by_image = long_video(pipe, "a cat", num_frames=9, start=Image.fromarray(picture), **SMALL).video
    assert np.array_equal(by_array, by_image)
    assert not np.array_equal(by_array, long_video(pipe, "a cat", num_frames=9, **SMALL).video)
    # this pipeline continues nothing by itself, so given frames are brought to the noise of the queue
    renoised = long_video(pipe, "a cat", num_frames=9, start=picture, start_as="renoise", **SMALL).video
    assert np.array_equal(by_array, renoised)
    kept = long_video(pipe, "a cat", num_frames=9, start=picture, start_as="condition", **SMALL).video
    assert not np.array_equal(by_array, kept)
    clip = torch.rand(9, 3, 32, 32) * 2 - 1
    assert long_video(pipe, "a cat", num_frames=9, start=clip, **SMALL).frames == 9
    for wrong, message in (
        (np.zeros((16, 32, 3), np.uint8), "must be 32 x 32 like the film"),
        (np.zeros((32, 32), np.uint8), "must be pictures"),
        (np.zeros((32, 32, 3), np.float32), "must be pictures"),
        (torch.zeros(9, 1, 32, 32), "start as a tensor"),
        (torch.zeros(49, 3, 32, 32), "must fit into the queue's 4 latents"),
        (torch.zeros(3, 3, 32, 32), "nearest are 1 and 5"),
    ):
        with pytest.raises(GenAttnError, match=message):
            long_video(pipe, "a cat", num_frames=9, start=wrong, **SMALL)


def test_block_caches_are_put_aside_with_a_notice_and_come_back(pipe):
    from diffusers import FirstBlockCacheConfig

    plain = long_video(pipe, "a cat", num_frames=9, **SMALL).video
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    try:
        video = long_video(pipe, "a cat", num_frames=9, stream=True, **SMALL)
        with pytest.warns(GenAttnWarning, match="FirstBlockCacheConfig of transformer assumes one timestep"):
            frames = list(video)
        assert pipe.transformer.is_cache_enabled
        assert video.caches_off
    finally:
        pipe.transformer.disable_cache()
    assert np.array_equal(np.stack(frames), plain)


def test_patterns_and_their_steps_reach_the_windows(pipe):
    import genattn
    from genattn.patterns.dense import DensePattern

    plain = long_video(pipe, "a cat", num_frames=9, **SMALL).video
    with genattn.apply(pipe, DensePattern()) as handle:
        under = long_video(pipe, "a cat", num_frames=9, **SMALL).video
        assert handle.report().forwards > 0
    assert np.array_equal(plain, under)


def test_steps_are_told_by_the_level_of_the_window(pipe):
    from genattn.seam.plugin import Plugin

    seen = []

    class Watch(Plugin):
        def forward(self, run, args, kwargs, inner):
            seen.append((run.step, run.num_steps, run.pass_name))
            return inner(*args, **kwargs)

    import genattn

    with genattn.apply(pipe, Watch()):
        long_video(pipe, "a cat", num_frames=1, **FULL)
    assert {n for _, n, _ in seen} == {4}
    assert {p for _, _, p in seen} == {"cond", "uncond"}
    ticks = [step for step, _, name in seen if name == "cond"]
    # the clip: steps 0 to 3; a tick: from the noisiest window to the cleanest
    assert ticks[:4] == [0, 1, 2, 3]
    assert ticks[4:6] == [0, 2]


def test_softpag_broadway_and_radial_work_in_the_queue_gated_by_level(pipe):
    import genattn
    from genattn.guidance.broadway.broadway import BroadWay
    from genattn.guidance.softpag.softpag import SoftPAG
    from genattn.patterns.radial import RadialPattern
    from genattn.seam.plugin import Plugin

    extra = []

    class Watch(Plugin):
        def forward(self, run, args, kwargs, inner):
            if run.extra is not None:
                extra.append(run.step)
            return inner(*args, **kwargs)

    plain = long_video(pipe, "a cat", num_frames=9, **FULL).video
    with genattn.apply(pipe, SoftPAG("L1H0", u=1.0, scale=2.0, stop=0.3), Watch()):
        guided = long_video(pipe, "a cat", num_frames=9, **FULL).video
    # windows of a four-level queue stand at steps 0 and 2; the last is beyond the guided part
    assert set(extra) == {0, 1}
    assert not np.array_equal(plain, guided)
    for plugin in (BroadWay(alpha=0.5, beta=2.0, stop=0.6), RadialPattern()):
        with genattn.apply(pipe, plugin):
            changed = long_video(pipe, "a cat", num_frames=9, **FULL).video
        assert changed.shape == plain.shape
    assert np.array_equal(plain, long_video(pipe, "a cat", num_frames=9, **FULL).video)


WIDE = {**FULL, "height": 64, "width": 64}


@pytest.mark.filterwarnings("ignore:genattn. .* acts at no step")
def test_windows_attend_to_neighborhoods_only_at_the_levels_that_are_sparse(pipe):
    import genattn

    # windows of a four-level queue stand at steps 0 and 2: with two dense steps the noisier one stays dense
    plain = long_video(pipe, "a cat", num_frames=9, **WIDE).video
    calls = {}
    for dense_steps in (0, 2, 4):
        with genattn.apply(pipe, genattn.NeighborhoodPattern((1, 3, 3)), dense_steps=dense_steps, dense_layers=0) as handle:
            video = long_video(pipe, "a cat", num_frames=9, **WIDE).video
            report = handle.report()
        assert video.shape == plain.shape
        assert np.array_equal(video, plain) == (dense_steps == 4)
        calls[dense_steps] = report.sparse_calls
        assert dense_steps == 4 or report.density < 1
    assert calls[0] == report.calls > calls[2] > calls[4] == 0


def test_radial_windows_skip_pairs_of_far_frames(pipe):
    import genattn

    settings = {**WIDE, "window": 8, "num_inference_steps": 8}
    plain = long_video(pipe, "a cat", num_frames=5, **settings).video
    with genattn.apply(pipe, genattn.RadialPattern(decay=0.2, floor=0), dense_steps=0, dense_layers=0) as handle:
        video = long_video(pipe, "a cat", num_frames=5, **settings).video
        assert handle.report().density < 1
    assert not np.array_equal(video, plain)


def test_a_neighborhood_as_wide_as_the_window_changes_nothing(pipe):
    import genattn

    plain = long_video(pipe, "a cat", num_frames=9, **WIDE).video
    with genattn.apply(pipe, genattn.NeighborhoodPattern(-1), dense_steps=0, dense_layers=0) as handle:
        under = long_video(pipe, "a cat", num_frames=9, **WIDE).video
        assert handle.report().sparse_calls > 0
    assert np.abs(plain.astype(int) - under.astype(int)).max() <= 1


# ---- stopping


def test_ctrl_c_finishes_the_tick_and_keeps_everything(pipe, tmp_path):
    video = long_video(pipe, "a cat", folder=tmp_path, stream=True, **SMALL)
    before = signal.getsignal(signal.SIGINT)
    frames = []
    for frame in video:
        frames.append(frame)
        if len(frames) == 12:
            os.kill(os.getpid(), signal.SIGINT)
    assert video.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert len(film(tmp_path / "video.mp4")) == len(frames) == queue_checkpoint.read_record(tmp_path)["frames"]


def test_a_stop_before_the_first_tick_keeps_the_first_clip(pipe, tmp_path, monkeypatch):
    whole = list(long_video(pipe, "a cat", num_frames=5, stream=True, **SMALL))
    save = long_video_run.LongVideo._save

    def interrupted(self):
        save(self)
        if self.stopped != "interrupted":  # the save before the ticks, not the one behind them
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(long_video_run.LongVideo, "_save", interrupted)
    for resumed in (False, True):  # while it warms up, and where that is gone on with
        asked = {"resume": tmp_path} if resumed else {"prompt": "a cat", "num_frames": 5, "folder": tmp_path, **SMALL}
        video = long_video(pipe, **asked, stream=True)
        assert list(video) == []
        assert video.stopped == "interrupted"
        assert queue_checkpoint.read_record(tmp_path)["tick"] == 0
    monkeypatch.undo()
    assert np.array_equal(list(long_video(pipe, resume=tmp_path, stream=True)), whole)


@pytest.mark.usefixtures("hangup_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_stops_at_once(number):
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked
        assert StopRequest.last_signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_stop_is_heard_without_a_terminal_and_not_under_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gone, write = os.pipe()
    os.close(gone)
    try:
        with StopRequest() as stop, os.fdopen(write, "w", buffering=1) as closed:
            monkeypatch.setattr(sys, "stderr", closed)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
            os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # what is still in the buffer goes nowhere
    finally:
        signal.signal(signal.SIGHUP, before)


RUNNER = """
import sys
sys.path.insert(0, {tests!r})
import video_pipes
from genattn.pipelines.long_video import long_video
long_video(video_pipes.wan(), "a cat", folder={folder!r}, checkpoint_every=3, **{settings!r})
"""


def test_kill_9_loses_little_and_the_film_plays_and_goes_on(pipe, tmp_path):
    folder, tests = tmp_path / "run", os.path.dirname(video_pipes.__file__)
    code = RUNNER.format(tests=tests, folder=str(folder), settings=SMALL)
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if (folder / "checkpoint.json").exists() and queue_checkpoint.read_record(folder)["frames"] >= 30:
                break
            assert child.poll() is None, "the child ended before it was killed"
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    record = queue_checkpoint.read_record(folder)
    left = film(folder / "video.mp4")
    # a fragment is at most 16 frames, a checkpoint three latents
    assert len(left) >= record["film"]["frames"] == record["frames"]
    goal = record["frames"] + 8
    resumed = long_video(pipe, resume=folder, num_frames=goal, progress=False)
    straight = long_video(pipe, "a cat", num_frames=goal, **SMALL).video
    assert resumed.frames == goal
    whole = film(folder / "video.mp4")
    assert len(whole) == goal
    assert np.abs(whole.astype(int) - straight).mean() < 12


@pytest.mark.parametrize("place", ["film", "checkpoint"])
def test_a_full_disk_stops_cleanly_and_keeps_the_checkpoint(pipe, tmp_path, monkeypatch, place):
    full = OSError(errno.ENOSPC, "No space left on device")
    saves = []

    def save(folder, tensors, record):
        if place == "checkpoint" and saves and saves[-1] > 0:
            raise full
        saves.append(record["frames"])
        return queue_checkpoint.save_checkpoint(folder, tensors, record)

    monkeypatch.setattr(long_video_run, "save_checkpoint", save)
    video = long_video(pipe, "a cat", folder=tmp_path, checkpoint_every=2, stream=True, **SMALL)
    if place == "film":
        append = video.parts.writer._append

        def refuse(data):
            if saves[-1] > 0:
                raise full
            append(data)

        monkeypatch.setattr(video.parts.writer, "_append", refuse)
    with pytest.raises(GenAttnError, match="No space left.*plays up to frame.*make room and resume"):
        list(video)
    monkeypatch.undo()
    assert saves[:-1] == [0] * (len(saves) - 1)
    assert len(film(tmp_path / "video.mp4")) >= saves[-1] > 0
    goal = saves[-1] + 4
    assert long_video(pipe, resume=tmp_path, num_frames=goal, progress=False).frames == goal


def test_a_run_stopped_while_it_warms_up_goes_on_too(pipe, tmp_path, monkeypatch):
    long = {**SMALL, "num_inference_steps": 8}
    straight = long_video(pipe, "a cat", num_frames=9, **long).video
    video = long_video(pipe, "a cat", num_frames=9, folder=tmp_path, checkpoint_every=1, stream=True, **long)
    tick = video.parts.fifo.tick

    def tick_twice_then_fail():
        if video.parts.fifo.queue.tick == 2:
            raise RuntimeError("on purpose")
        return tick()

    monkeypatch.setattr(video.parts.fifo, "tick", tick_twice_then_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(video)
    assert queue_checkpoint.read_record(tmp_path)["frames"] == 0
    rest = list(long_video(pipe, resume=tmp_path, stream=True, progress=False))
    assert np.array_equal(np.stack(rest), straight)


def test_an_error_of_the_model_keeps_the_film_and_the_last_checkpoint(pipe, tmp_path, monkeypatch):
    video = long_video(pipe, "a cat", folder=tmp_path, checkpoint_every=1, stream=True, **SMALL)
    stream = iter(video)
    for _ in range(6):
        next(stream)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    monkeypatch.undo()
    kept = queue_checkpoint.read_record(tmp_path)["frames"]
    assert len(film(tmp_path / "video.mp4")) >= kept > 0
    assert long_video(pipe, resume=tmp_path, num_frames=kept + 4, progress=False).frames == kept + 4


def test_latents_that_are_not_finite_stop_the_run(pipe, monkeypatch):
    video = long_video(pipe, "a cat", num_frames=9, stream=True, **SMALL)
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: (forward(*a, **k)[0] * float("nan"),))
    with pytest.raises(GenAttnError, match="not finite at latent 0"):
        list(video)


# ---- what is refused


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_frames": 26}, "nearest are 25 and 29"),
        ({"num_frames": 0}, "num_frames must be >= 1"),
        ({"height": 33, "num_frames": 5}, "must be multiples of"),
        ({"prompt": '0:"a" 9:"b" 4:"c"', "num_frames": 5}, "must rise"),
        ({"prompt": "", "num_frames": 5}, "must be a text or a schedule"),
        ({"fps": 0, "num_frames": 5}, "fps must lie in"),
        ({"window_batch": 0, "num_frames": 5}, "window_batch must be >= 1"),
        ({"checkpoint_every": 0, "num_frames": 5}, "checkpoint_every must be >= 1"),
        ({"drift_correction": 2, "num_frames": 5}, "drift_correction must be 0 to 1"),
        ({"window": 0, "num_frames": 5}, "window must be >= 1"),
        ({"latents_per_level": 9, "num_frames": 5}, "latents_per_level must be"),
        ({"eta": 2, "num_frames": 5}, "eta must be"),
        ({"num_inference_steps": 1, "num_frames": 5}, "the queue must hold a whole window of . latents"),
        ({}, "without end needs output, folder or stream"),
        ({"num_frames": 5, "ouroboros": Ouroboros(subject_attention=True)}, "use memory_frames instead"),
        ({"num_frames": 5, "ouroboros": Ouroboros(subject="dog", guidance=0.1)}, "must stand in the prompt"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(pipe, monkeypatch, tmp_path, extra, message):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises(GenAttnError, match=message):
        long_video(pipe, **{"prompt": "a cat", **SMALL, **extra})
    if not extra:  # a folder is a place for a film without end
        return
    with pytest.raises(GenAttnError, match=message):
        long_video(pipe, **{"prompt": "a cat", **SMALL, **extra, "folder": tmp_path / "film"})
    assert list(tmp_path.rglob("*")) == [], "a refused film leaves nothing, no lock either"


def test_a_run_that_is_stopped_before_its_first_clip_leaves_what_was_there(pipe, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "note.txt").write_text("mine")
    monkeypatch.setattr(pipe.transformer, "forward", stop)
    for folder in (kept, tmp_path / "new" / "run"):
        with pytest.raises(KeyboardInterrupt):
            long_video(pipe, "a cat", num_frames=5, folder=folder, **SMALL)
    assert sorted(tmp_path.rglob("*")) == [kept, kept / "note.txt"]


def test_resuming_with_another_model_other_settings_or_version_is_refused(pipe, tmp_path, monkeypatch):
    long_video(pipe, "a cat", num_frames=5, folder=tmp_path, **SMALL)
    with pytest.raises(GenAttnError, match="already holds a run"):
        long_video(pipe, "a cat", num_frames=5, folder=tmp_path, **SMALL)
    with pytest.raises(GenAttnError, match="keeps its settings, got prompt, seed beside resume"):
        long_video(pipe, "a dog", resume=tmp_path, seed=3)
    other = video_pipes.wan()
    with torch.no_grad():
        other.transformer.blocks[1].ffn.net[2].weight += 0.01
    with pytest.raises(GenAttnError, match="other settings or another model: model was"):
        long_video(other, resume=tmp_path)
    reads_otherwise = video_pipes.wan()
    with torch.no_grad():
        next(p for p in reads_otherwise.text_encoder.parameters() if p.ndim == 2).add_(0.01)
    with pytest.raises(GenAttnError, match="other settings or another model: model was"):
        long_video(reads_otherwise, resume=tmp_path)
    import diffusers

    shifted = video_pipes.wan(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    with pytest.raises(GenAttnError, match="solver"):
        resume_video(shifted, tmp_path)
    monkeypatch.setattr("genattn.__version__", "9.9")
    with pytest.raises(GenAttnError, match=r"this is 9\.9"):
        long_video(pipe, resume=tmp_path)


def test_broken_folders_are_refused(pipe, tmp_path):
    with pytest.raises(GenAttnError, match="holds no checkpoint.json"):
        long_video(pipe, resume=tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(GenAttnError, match="no valid JSON"):
        long_video(pipe, resume=tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format": 99}')
    with pytest.raises(GenAttnError, match="checkpoint format 99"):
        long_video(pipe, resume=tmp_path)
    run = tmp_path / "run"
    long_video(pipe, "a cat", num_frames=5, folder=run, **SMALL)
    film_path = run / "video.mp4"
    whole = film_path.read_bytes()
    film_path.write_bytes(whole[:100])
    with pytest.raises(GenAttnError, match="it was changed or moved"):
        long_video(pipe, resume=run)
    film_path.write_bytes(whole)
    next(run.glob("state-*")).unlink()
    with pytest.raises(GenAttnError, match="it was moved or deleted"):
        long_video(pipe, resume=run)


def test_settings_go_through_json_and_unknown_ones_are_refused():
    settings = LongVideoSettings(prompt="a", seed=3, ouroboros=Ouroboros().to_json())
    assert LongVideoSettings.from_json(settings.to_json()) == settings
    with pytest.raises(GenAttnError, match="settings unknown here: mood"):
        LongVideoSettings.from_json({**settings.to_json(), "mood": 1})


def test_sizes_that_nobody_tells_are_asked_for():
    unet = video_pipes.animatediff()
    with pytest.raises(GenAttnError, match="height and width must be given"):
        long_video(unet, "a cat", num_frames=4, window=4, progress=False)


def test_a_folder_may_say_what_its_model_was_made_for(tmp_path):
    from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser

    pipe = video_pipes.wan()
    base = frame_denoiser(pipe)
    assert base.default_window() == 21
    pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "genattn_defaults.json").write_text('{"height": 64, "width": 48, "frames": 29, "guidance_scale": 2.5}')
    assert base.default_window() == 8
    assert base.default_size() == (64, 48)
    assert LongVideoSettings("a").scale(base) == 2.5
    (tmp_path / "genattn_defaults.json").write_text("{")
    with pytest.raises(GenAttnError, match="must be a readable JSON file.*mend or remove the file"):
        base.shipped()


@pytest.mark.parametrize("family", ["AnimateDiff", "CogVideoX", "LTX-Video"])
def test_other_decode_routes_run_and_resume(family, tmp_path):
    builder, size, _, _ = video_pipes.FAMILIES[family]
    other = builder()
    call = {"height": size, "width": size, "window": 3, "num_inference_steps": 3, "guidance_scale": 1.0, "progress": False}
    ends = {"AnimateDiff": (4, 9), "CogVideoX": (9, 25), "LTX-Video": (9, 49)}[family]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        straight = long_video(other, "a cat", num_frames=ends[1], **call).video
        assert len(straight) == ends[1]
        video = long_video(other, "a cat", num_frames=ends[1], folder=tmp_path, stream=True, **call)
        for i, _ in enumerate(video):
            if i == ends[0]:
                break
        rest = list(long_video(other, resume=tmp_path, stream=True, progress=False))
    assert np.array_equal(np.stack(rest), straight[video.frames :])


# ---- constant memory

MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import video_pipes
from genattn.pipelines.long_video import long_video
pipe = video_pipes.{family}()
call = dict(height={size}, width={size}, window=3, num_inference_steps=3, guidance_scale=1.0, progress=False)
video = long_video(pipe, "a cat", num_frames={frames}, output={path!r}, stream=True, **call)
count = sum(1 for _ in video)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_memory(family, size, frames, path):
    tests = os.path.dirname(video_pipes.__file__)
    code = MEMORY.format(tests=tests, family=family, size=size, frames=frames, path=str(path))
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=540,
    )
    count, peak = out.stdout.split()[-2:]
    assert int(count) == frames
    return float(peak)


@pytest.mark.parametrize(("family", "size", "short", "long"), [("wan", 32, 61, 157)])
def test_memory_does_not_grow_with_the_film(tmp_path, family, size, short, long):
    low, high = (peak_memory(family, size, n, tmp_path / f"{n}.mp4") for n in (short, long))
    assert high < 1.02 * low


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size", "short", "long"), [("wan", 32, 61, 1001), ("animatediff", 16, 60, 1000), ("ltx", 32, 61, 1001)]
)
def test_memory_of_a_thousand_frames_is_that_of_sixty(tmp_path, family, size, short, long):
    test_memory_does_not_grow_with_the_film(tmp_path, family, size, short, long)
