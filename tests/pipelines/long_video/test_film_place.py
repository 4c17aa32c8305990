"""Where a film stands, and what it must be resumed with: asked before any work, remembered, and compared."""

import numpy as np
import pytest
import video_pipes

import genattn
from genattn import NeighborhoodPattern
from genattn.errors import GenAttnError
from genattn.pipelines.long_video.generate import long_video, resume_video
from genattn.pipelines.long_video.output.film_path import film_path
from genattn.pipelines.long_video.settings import LongVideoSettings

SMALL = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return video_pipes.wan()


def stopped(pipe, monkeypatch, ticks, **call):
    """A film whose process died after that many ticks."""
    video = long_video(pipe, "a cat", num_frames=17, checkpoint_every=1, stream=True, **SMALL, **call)
    tick = video.parts.fifo.tick

    def some_ticks():
        if video.parts.fifo.queue.tick == ticks:
            raise RuntimeError("on purpose")
        return tick()

    monkeypatch.setattr(video.parts.fifo, "tick", some_ticks)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(video)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ticks", [1, 4])
def test_a_film_beside_its_checkpoint_goes_on_in_the_same_file(pipe, tmp_path, monkeypatch, ticks, inside):
    """Also where nothing but the place was written yet: the file is that of a run which was never stopped, to the byte."""
    run, film = tmp_path / "run", (tmp_path / "run" if inside else tmp_path / "else") / "cat.mp4"
    whole = long_video(pipe, "a cat", num_frames=17, checkpoint_every=1, folder=tmp_path / "whole", **SMALL)
    stopped(pipe, monkeypatch, ticks, folder=run, output=film)
    if inside:
        run = run.rename(tmp_path / "moved")
        film = run / "cat.mp4"
    result = long_video(pipe, resume=run, progress=False)
    assert result.path == film
    assert film.read_bytes() == whole.path.read_bytes()
    assert not (run / "video.mp4").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("film.gif", "ends in .mp4"), ("film", "ends in .mp4"), ("folder.mp4", "is a folder"), ("file/a.mp4", "that can be made")],
)
def test_a_place_that_cannot_be_is_refused_before_any_work(pipe, tmp_path, monkeypatch, name, message):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises(GenAttnError, match=message):
        long_video(pipe, "a cat", num_frames=5, output=tmp_path / name, **SMALL)


@pytest.mark.parametrize("fps", [0, -1, 241, float("nan"), float("inf"), 1e-6])
def test_a_rate_that_no_file_can_have_is_refused_before_any_work(pipe, monkeypatch, fps):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("work was started"))
    with pytest.raises(GenAttnError, match=r"fps must lie in \(0, 240\]"):
        long_video(pipe, "a cat", num_frames=5, fps=fps, **SMALL)


def test_pictures_of_several_sizes_are_refused(pipe):
    pictures = [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)]
    with pytest.raises(GenAttnError, match="pictures of one size"):
        long_video(pipe, "a cat", num_frames=5, start=pictures, **SMALL)


def test_what_is_on_the_model_must_be_there_again(pipe, tmp_path):
    pattern = NeighborhoodPattern(window_size=(1, 2, 2))
    with genattn.apply(pipe, pattern):
        long_video(pipe, "a cat", num_frames=5, folder=tmp_path, **SMALL)
        again = resume_video(pipe, tmp_path, progress=False).parts
        again.writer.close()
        again.locks.release()
    with pytest.raises(GenAttnError, match="plugins"):
        resume_video(pipe, tmp_path, progress=False)
    with genattn.apply(pipe, NeighborhoodPattern(window_size=(1, 2, 4))), pytest.raises(GenAttnError, match="plugins"):
        resume_video(pipe, tmp_path, progress=False)


def test_a_length_that_the_decoder_is_past_is_refused(tmp_path):
    """LTX's decoder holds frames back, so that the film has fewer than its checkpoint has decoded."""
    builder, size, _, _ = video_pipes.FAMILIES["LTX-Video"]
    call = {**SMALL, "height": size, "width": size, "num_inference_steps": 3}
    other = builder()
    video = long_video(other, "a cat", num_frames=65, folder=tmp_path, stream=True, checkpoint_every=1, **call)
    for number, _ in enumerate(video):
        if number == 0:
            break
    with pytest.raises(GenAttnError, match="those in the decoder included, and cannot become shorter"):
        long_video(other, resume=tmp_path, num_frames=29, progress=False)


def test_a_film_that_may_not_be_written_is_refused_before_any_work(pipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))
    with pytest.raises(GenAttnError, match="output must be a file that may be written, got .*film.mp4.; choose another place"):
        film_path(tmp_path / "film.mp4", None)
    (tmp_path / "film.mp4").touch()
    with pytest.raises(GenAttnError, match="output must be a file that may be written"):
        film_path(tmp_path / "film.mp4", None)
    assert asked == [tmp_path, tmp_path / "film.mp4"]


def test_a_window_beyond_the_models_limit_is_refused(pipe):
    class Short:
        def default_window(self):
            return 9

        def limits(self, latents):
            return f"the position table ends before {latents} latents"

    with pytest.raises(GenAttnError, match="the position table ends before 9 latents"):
        LongVideoSettings("a cat", num_frames=99).queue_shape(Short())
