"""The measures on clips whose faults are known: each fault is found by its measure, and not where there is none."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.quality import video_metrics as metrics

cv2 = pytest.importorskip("cv2", reason="optical flow needs OpenCV")
FRAMES, HEIGHT, WIDTH = 48, 96, 128


def scene():
    rng = np.random.default_rng(0)
    back = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8), (0, 0), 5)
    back = cv2.normalize(back, None, 40, 200, cv2.NORM_MINMAX)
    ball = cv2.resize(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), (28, 28), interpolation=cv2.INTER_CUBIC)
    return back, ball


BACK, BALL = scene()


def clip(speed=0.0, noise=0.0, fade=0.0, swap=None, loop=None, cut=None, jerk=0, frames=FRAMES):
    rng = np.random.default_rng(1)
    out = []
    for t in range(frames):
        u = t % loop if loop else t
        picture = BACK.astype(np.float32).copy()
        # back and forth without a jump at the wall
        x = int(speed * u + jerk * (t % 2)) % (2 * (WIDTH - 32))
        x = min(x, 2 * (WIDTH - 32) - x)
        picture[30:58, x : x + 28] = 255 - BALL if swap and t >= swap else BALL
        if cut and t >= cut:
            picture = np.roll(picture, 40, 1)
        picture = picture * (1 - fade * t / frames) + rng.normal(0, 1, picture.shape) * noise
        out.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(out)


def test_flicker_is_found():
    steady, flickering = metrics.temporal_flickering(clip(2.5)), metrics.temporal_flickering(clip(2.5, noise=12))
    assert metrics.temporal_flickering(clip()) == 1.0
    assert steady > 0.98 > flickering
    # VBench's formula written out
    video = clip(2.5)
    want = 1 - np.abs(np.diff(video.astype(np.float64), axis=0)).mean() / 255
    assert steady == pytest.approx(want, abs=1e-6)


def test_jerky_motion_is_less_smooth():
    assert metrics.motion_smoothness(clip()) == pytest.approx(1.0, abs=1e-6)
    assert metrics.motion_smoothness(clip(2)) > metrics.motion_smoothness(clip(2, jerk=9)) + 0.002


def test_faster_is_more_dynamic():
    (still, no), (slow, _), (fast, yes) = (metrics.dynamic_degree(clip(s)) for s in (0, 2, 6))
    assert still < 0.1
    assert still < slow < fast
    assert (no, yes) == (False, True)
    assert slow == pytest.approx(2, rel=0.35)
    # twice the frame rate thins the film to every second frame
    assert metrics.dynamic_degree(clip(2), fps=16)[0] > 1.5 * slow


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_a_clip_of_a_few_frames_is_not_thinned_to_a_still(frames):
    video = np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
    assert metrics.dynamic_degree(video, fps=60.0) == metrics.dynamic_degree(video[[0, -1]], fps=8.0)


def test_a_swapped_subject_is_seen_inside_the_mask_only():
    steady, swapped = clip(2.5), clip(2.5, swap=24)
    same, other = metrics.subject_consistency(steady), metrics.subject_consistency(swapped)
    assert same is not None
    assert other is not None
    assert same - other > 0.02
    gap = metrics.background_consistency(steady) - metrics.background_consistency(swapped)
    assert abs(gap) < 0.25 * (same - other)


def test_a_changed_background_is_seen_outside_the_mask():
    video = clip(2.5)
    changed = video.copy()
    changed[24:] = np.roll(changed[24:], 48, axis=2)
    masks = metrics.motion_masks(video)
    assert metrics.background_consistency(changed, masks) < metrics.background_consistency(video, masks) - 0.01


def test_no_subject_no_number():
    assert metrics.subject_consistency(clip()) is None


def test_fading_is_a_slope():
    slopes = metrics.drift(clip(2.5, fade=0.6))
    assert slopes["brightness"] < -30
    assert slopes["contrast"] < -10
    assert abs(metrics.drift(clip(2.5))["brightness"]) < 3


@pytest.mark.parametrize("cut", [12, 30])
def test_a_cut_is_a_seam_where_it_is(cut):
    assert metrics.seams(clip(2.5, cut=cut)) == [cut]
    assert metrics.seams(clip(2.5)) == []


def test_a_loop_is_found_with_its_lag():
    lag, strength = metrics.repetition(clip(2.5, loop=16))
    assert lag == 16
    assert strength > 0.95
    assert metrics.repetition(clip(1.2))[1] < 0.9
    assert metrics.repetition(clip(frames=12)) is None
    assert metrics.repetition(clip(frames=17)) is None  # a lag of 8 would not come twice
    assert metrics.repetition(clip(frames=18)) is not None


def test_all_measures_of_an_array_and_of_a_file(tmp_path):
    import json

    from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer

    video = clip(2.5)
    with FragmentedMp4Writer(tmp_path / "a.mp4", 16, crf=4) as writer:
        for frame in video:
            writer.write(frame)
    a, b = metrics.measure(video, fps=16), metrics.measure(tmp_path / "a.mp4")
    assert json.loads(json.dumps(a)) == a
    assert (b["frames"], b["fps"]) == (FRAMES, 16.0)
    for name in ("temporal_flickering", "motion_smoothness", "background_consistency"):
        assert a[name] == pytest.approx(b[name], abs=0.01)
    assert a["dynamic_degree"] == pytest.approx(b["dynamic_degree"], rel=0.2)


def test_what_is_no_video_is_refused(tmp_path):
    with pytest.raises(GenAttnError, match=r"uint8 \[T, H, W, 3\]"):
        metrics.temporal_flickering(np.zeros((3, 16, 16, 3)))
    with pytest.raises(GenAttnError, match="got list"):
        metrics.temporal_flickering([1])
    with pytest.raises(GenAttnError, match=">= 2 frames"):
        metrics.temporal_flickering(clip(frames=1))
    with pytest.raises(GenAttnError, match="masks must be bool"):
        metrics.subject_consistency(clip(), np.zeros((FRAMES, 2, 2), bool))
    with pytest.raises(GenAttnError, match="is no file"):
        metrics.measure(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(GenAttnError, match="could not be read as a video"):
        metrics.measure(tmp_path / "text.mp4")


def test_without_opencv_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(GenAttnError, match="pip install opencv-python-headless"):
        metrics.motion_smoothness(clip())
    assert metrics.temporal_flickering(clip()) == 1.0


def test_a_film_without_a_frame_is_refused(tmp_path, monkeypatch):
    import av

    metrics_file = tmp_path / "film.mp4"
    metrics_file.touch()
    streams = SimpleNamespace(video=[SimpleNamespace(average_rate=8)])
    empty = SimpleNamespace(streams=streams, decode=lambda video: iter(()))
    monkeypatch.setattr(av, "open", lambda name: contextlib.nullcontext(empty))
    with pytest.raises(GenAttnError, match="film.mp4 holds no frames"):
        metrics.read_video(metrics_file)


def ramp(down, right, channel=slice(None)):
    """Brightness that rises by `down` a row and `right` a column, in some channels; all of it in the darkest sixth."""
    y, x = np.mgrid[:8, :8]
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., channel] = ((y if down >= 0 else 7 - y) * abs(down) + (x if right >= 0 else 7 - x) * abs(right))[..., None]
    return picture


def unit(values):
    return np.asarray(values) / np.linalg.norm(values)


def test_a_subjects_colours_are_counted_by_their_roots():
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, :4], frame[:, 4:] = (255, 0, 43), (42, 128, 213)
    mask = np.zeros((8, 8), bool)
    mask[0:6, 0:2] = mask[0:4, 6:7] = True  # away from the border: no edge is inside
    wanted = np.zeros((6, 6, 6))
    wanted[5, 0, 1], wanted[0, 3, 4] = np.sqrt(12 / 16), np.sqrt(4 / 16)
    found = metrics.subject_features(frame, mask)
    assert found.shape == (216 + 9,)
    assert np.allclose(found, np.concatenate([wanted.ravel(), np.zeros(9)]))


@pytest.mark.parametrize(("down", "right", "part"), [(0, 3, 0), (3, 0, 4), (2, 2, 2), (2, -2, 6), (0, -3, 0), (-3, 0, 4)])
@pytest.mark.parametrize(
    ("channel", "weight"), [(slice(None), 1.0), (slice(0, 1), 0.299), (slice(1, 2), 0.587), (slice(2, 3), 0.114)]
)
def test_a_subjects_edges_are_counted_by_their_direction_and_strength(down, right, part, channel, weight):
    mask = np.zeros((8, 8), bool)
    mask[1:5, 2:7] = True
    wanted = np.zeros(225)
    wanted[0] = 1  # one colour
    wanted[216 + part] = weight * np.hypot(down, right) / 255
    assert np.allclose(metrics.subject_features(ramp(down, right, channel), mask), unit(wanted), atol=1e-7)


def test_a_subject_of_one_pixel_has_features():
    mask = np.zeros((8, 8), bool)
    mask[3, 3] = True
    wanted = np.zeros(225)
    wanted[0], wanted[216] = 1, 3 / 255
    assert np.allclose(metrics.subject_features(ramp(0, 3), mask), unit(wanted), atol=1e-7)


def test_no_subject_has_no_features():
    assert not metrics.subject_features(ramp(1, 1), np.zeros((8, 8), bool)).any()


def test_a_background_is_told_by_the_colours_of_sixteen_places():
    frame, mask = np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), bool)
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    frame[...] = np.repeat(np.repeat(levels, 2, 0), 3, 1)[..., None] * np.array([1, 0, 1], np.uint8)
    frame[0, 0], mask[0, 0] = 255, True  # what is masked does not count
    mask[2:4, 3:6] = True  # nor does a place that is masked as a whole
    found = metrics.background_features(frame, mask).reshape(4, 4, 15)
    wanted = np.zeros((4, 4, 6))
    wanted[..., 0] = wanted[..., 2] = 2 * (levels / 255) - 1
    wanted[..., 1] = -1
    wanted[1, 1] = 0
    scale = found[3, 3, 10] / -1.0  # the second mean is -1 everywhere
    assert scale > 0
    assert np.allclose(found[..., 9:], wanted * scale, atol=1e-7)
    assert not found[1, 1].any()
    assert np.linalg.norm(found) == pytest.approx(1)


def test_a_backgrounds_edges_and_spread_are_means_over_each_place():
    mask = np.zeros((8, 8), bool)
    mask[:, 0] = True
    found = metrics.background_features(ramp(0, 3), mask).reshape(4, 4, 15)
    wanted = np.zeros((4, 4, 15))
    wanted[..., 0] = 3 / 64
    wanted[..., 9:12] = 2 * (np.array([3, 7.5, 13.5, 19.5]) / 255)[None, :, None] - 1
    wanted[:, 1:, 12:] = 1.5 / 255
    assert np.allclose(found.ravel(), unit(wanted.ravel()), atol=1e-7)


def test_a_mask_is_where_some_channel_moved_by_more_than_the_threshold():
    video = np.full((5, 8, 8, 3), 100, np.uint8)
    video[3, 0, 0, 1], video[3, 1, 1, 2], video[3, 2, 2] = 118, 119, 81  # 18 is not more than 18
    wanted = np.zeros((5, 8, 8), bool)
    video[[2, 4], 5, 5] = 200  # two frames of five: the median looks at all of them
    wanted[3, 1, 1] = wanted[3, 2, 2] = wanted[[2, 4], 5, 5] = True
    assert (metrics.motion_masks(video) == wanted).all()
    assert metrics.motion_masks(video, 17.5)[3, 0, 0]
