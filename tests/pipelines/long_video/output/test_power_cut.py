"""A run outlasts a power cut at every point: what was not waited for may be lost, and it still goes on to the same frames."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import video_pipes
from power_cut import watching

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.generate import long_video, resume_video
from genattn.pipelines.long_video.output import durable
from genattn.pipelines.long_video.output.checkpoint import read_checkpoint, save_checkpoint
from genattn.pipelines.long_video.output.folder_lock import FilmLock, FolderLock

SMALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return video_pipes.wan()


def checkpoints(folder, monkeypatch):
    """Three checkpoints, two of one tick; the log, and how many were done at each of its moments."""
    done = []
    with watching(folder, monkeypatch) as log:
        for tick, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
            save_checkpoint(folder, {"a": torch.full((4,), value)}, {"tick": tick, "value": value})
            done += [value] * (len(log.moments) - len(done))
            log.mark()
            done.append(value)
    return log, done


def values_after_a_cut(log, tmp_path):
    for i, found in enumerate(log.states()):
        folder = found.write_to(tmp_path / str(i))
        try:
            record, tensors = read_checkpoint(folder)
        except GenAttnError as error:
            yield found.moment, None, str(error)
            continue
        assert torch.equal(tensors["a"], torch.full((4,), record["value"])), "record and tensors of two checkpoints"
        yield found.moment, record["value"], ""


def test_a_checkpoint_that_was_reported_done_is_there_after_any_cut(tmp_path, monkeypatch):
    log, done = checkpoints(tmp_path / "run", monkeypatch)
    cuts = list(values_after_a_cut(log, tmp_path / "after"))
    assert len(cuts) > 60
    finished = [0.0]
    for at, value in enumerate(done):
        # the last moment of each value is after its save returned
        finished.append(value if at + 1 == len(done) or done[at + 1] != value else finished[-1])
    for moment, value, error in cuts:
        if finished[moment + 1]:
            assert value is not None, f"moment {moment}: {error}"
            assert value >= finished[moment + 1]
        else:
            assert value == 1.0 or "holds no checkpoint.json" in error


@pytest.mark.parametrize("left_out", ["sync_file", "sync_folder"])
def test_the_cuts_find_a_missing_wait(tmp_path, monkeypatch, left_out):
    monkeypatch.setattr(durable, left_out, lambda path: None)
    log, _ = checkpoints(tmp_path / "run", monkeypatch)
    lost = 0
    for i, found in enumerate(log.states()):
        folder = found.write_to(tmp_path / "after" / str(i))
        try:
            read_checkpoint(folder)
        except GenAttnError as error:
            lost += "holds no checkpoint.json" not in str(error) or found.moment > len(log.moments) // 2
        except Exception:
            lost += 1
    assert lost


def test_a_run_goes_on_to_the_same_frames_after_a_cut_at_every_point(pipe, tmp_path, monkeypatch):
    straight = long_video(pipe, "a cat", num_frames=33, **SMALL).video
    with watching(tmp_path / "run", monkeypatch) as log:
        long_video(pipe, "a cat", num_frames=9, folder=tmp_path / "run", checkpoint_every=1, **SMALL)
        # on with it: latents that waited are taken first, at a tick that has a checkpoint already
        long_video(pipe, resume=tmp_path / "run", num_frames=17, progress=False)
    going_on, begun_anew, checked = 0, 0, set()
    for found in log.states():
        files = dict(found.files)
        folder = found.write_to(Path(tempfile.mkdtemp(dir=tmp_path)) / "run")
        try:
            video = resume_video(pipe, folder, num_frames=33, progress=False)
        except GenAttnError as error:
            if "holds no checkpoint.json" not in str(error):
                raise
            begun_anew += 1
            continue
        going_on += 1
        record = json.loads(files["checkpoint.json"])
        key = (record["tick"], record["frames"], record["tensors"])
        if key in checked:
            # the same checkpoint: what goes on from it is known; the film must reach up to it
            assert len(files["video.mp4"]) >= record["film"]["bytes"]
            video.parts.writer.abandon()
            video.parts.locks.release()
        else:
            checked.add(key)
            start = video.frames
            assert np.array_equal(np.stack(list(video)), straight[start:])
        shutil.rmtree(folder.parent)
    assert going_on > 100
    assert len(checked) >= 5
    # only the first checkpoint has nothing before it
    assert begun_anew < 40


def test_waiting_reaches_the_film_and_its_folder(pipe, tmp_path, monkeypatch):
    waited = []
    real = os.fsync

    def fsync(handle):
        waited.append(os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else "")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    long_video(pipe, "a cat", num_frames=5, folder=tmp_path / "run", **SMALL)
    if not any(waited):
        pytest.skip("this system does not tell the name of an open file")
    names = [Path(path).name for path in waited]
    assert names.index("run") < names.index("video.mp4") < names.index("state.partial") < names.index("checkpoint.partial")


# ---- one run per folder


def test_a_second_run_in_one_folder_is_refused_before_it_writes(pipe, tmp_path):
    folder = tmp_path / "run"
    first = long_video(pipe, "a cat", num_frames=9, folder=folder, stream=True, **SMALL)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(GenAttnError, match="is in use: another run writes there"):
        long_video(pipe, "a dog", num_frames=9, folder=folder, **SMALL)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    frames = iter(first)
    next(frames)
    with pytest.raises(GenAttnError, match="is in use"):
        long_video(pipe, resume=folder, progress=False)
    assert len(list(frames)) == 8
    assert long_video(pipe, resume=folder, num_frames=17, progress=False).frames == 17


def test_a_run_that_cannot_begin_lets_its_folder_go(pipe, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(GenAttnError, match="nearest are"):
        long_video(pipe, "a cat", num_frames=7, folder=folder, **SMALL)
    assert long_video(pipe, "a cat", num_frames=5, folder=folder, **SMALL).frames == 5
    with pytest.raises(GenAttnError, match="already holds a run"):
        long_video(pipe, "a cat", num_frames=5, folder=folder, **SMALL)
    assert long_video(pipe, resume=folder, progress=False).frames == 5


def test_the_lock_ends_with_its_release(tmp_path):
    lock = FolderLock(tmp_path / "a" / "b")
    with pytest.raises(GenAttnError, match="give another folder"):
        FolderLock(tmp_path / "a" / "b")
    lock.release()
    lock.release()
    FolderLock(tmp_path / "a" / "b").release()


# ---- one run per film


def test_a_second_run_to_one_film_is_refused_before_it_writes(pipe, tmp_path):
    film = tmp_path / "film.mp4"
    first = long_video(pipe, "a cat", num_frames=9, output=film, stream=True, **SMALL)
    frames = iter(first)
    next(frames)
    before = film.read_bytes()
    same = tmp_path / "elsewhere" / ".." / "film.mp4"
    for more in ({"output": film}, {"output": same}, {"output": film, "folder": tmp_path / "run"}):
        with pytest.raises(GenAttnError, match=r"film.mp4 is being written: another film writes there .* give another output"):
            long_video(pipe, "a dog", num_frames=9, **more, **SMALL)
    assert film.read_bytes() == before
    assert len(list(frames)) == 8
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["film.mp4"]
    assert not list(tmp_path.glob(".*"))
    assert long_video(pipe, "a dog", num_frames=5, output=film, **SMALL).frames == 5


def test_a_film_in_a_runs_folder_is_held_with_it_and_by_a_resumed_run(pipe, tmp_path):
    folder = tmp_path / "run"
    long_video(pipe, "a cat", num_frames=9, folder=folder, **SMALL)
    going_on = long_video(pipe, resume=folder, num_frames=13, stream=True, progress=False)
    with pytest.raises(GenAttnError, match=r"video.mp4 is being written"):
        long_video(pipe, "a dog", num_frames=5, output=folder / "video.mp4", **SMALL)
    assert len(list(going_on)) == 4
    assert not list(folder.glob(".*"))


def test_where_no_lock_can_be_made_none_is_held(tmp_path):
    (tmp_path / ".film.mp4.lock").mkdir()
    lock = FilmLock(tmp_path / "film.mp4")
    FilmLock(tmp_path / "film.mp4").release()
    lock.release()
    assert (tmp_path / ".film.mp4.lock").is_dir()


# ---- lengths beside resume


@pytest.mark.parametrize(("frames", "message"), [(0, "num_frames must be >= 1"), (5, "holds 9 frames and cannot become")])
def test_a_resumed_run_refuses_lengths_that_cannot_be(pipe, tmp_path, frames, message):
    long_video(pipe, "a cat", num_frames=9, folder=tmp_path / "run", **SMALL)
    with pytest.raises(GenAttnError, match=message):
        long_video(pipe, resume=tmp_path / "run", num_frames=frames, progress=False)
