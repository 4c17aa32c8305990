import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import world as world
from genattn.pipelines.tiny.oracle import judge, read_background, subject_consistency
from genattn.pipelines.tiny.segment import FoundObject, background_colour, check_clip, find_objects

OBJECT_ATTRIBUTES = ("colour", "shape", "motion", "size")


def blurred(clip, rng):
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    frames = torch.from_numpy(clip).float().permute(0, 3, 1, 2)
    weight = (kernel[:, None] * kernel)[None, None].repeat(3, 1, 1, 1)
    out = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), weight, groups=3)
    return out.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def noisy(clip, rng):
    return np.clip(clip + rng.normal(0, 10, clip.shape), 0, 255).astype(np.uint8)


def tinted(clip, rng):
    return np.clip(clip * rng.uniform(0.88, 1.0) + rng.uniform(0, 10, 3), 0, 255).astype(np.uint8)


def score(count, damage, size=64, frames=29, shuffle=0):
    scenes = [world.sample_scene(seed, seed % 2 == 1, two_objects=0.25) for seed in range(count)]
    rng = np.random.default_rng(0)
    right = {name: [] for name in (*OBJECT_ATTRIBUTES, "background", "count")}
    for index, scene in enumerate(scenes):
        verdict = judge(damage(world.render(scene, frames, size, size), rng), scenes[(index + shuffle) % count])
        for name in OBJECT_ATTRIBUTES:
            right[name] += [getattr(thing, name) for thing in verdict.objects]
        right["background"].append(verdict.background)
        right["count"].append(verdict.count)
    return {name: np.mean(flags) for name, flags in right.items()}


@pytest.mark.parametrize("damage", [lambda clip, rng: clip, blurred, noisy, tinted])
def test_ground_truth_is_recognised(damage):
    shares = score(40, damage)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize(("size", "frames"), [(48, 16), (96, 9)])
def test_other_sizes_are_recognised(size, frames):
    shares = score(25, lambda clip, rng: clip, size, frames)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda clip, rng: clip, blurred, noisy, tinted])
def test_ground_truth_is_recognised_in_a_thousand_clips(damage):
    shares = score(1000, damage)
    assert min(shares.values()) >= 0.98, shares


def test_other_captions_score_as_chance_would():
    scenes = [world.sample_scene(seed, two_objects=0.0) for seed in range(30)]
    clips = [world.render(scene, 9) for scene in scenes]
    right = {name: [] for name in ("colour", "shape", "motion")}
    for index, clip in enumerate(clips):
        for step in (7, 13, 21):
            verdict = judge(clip, scenes[(index + step) % len(scenes)]).objects[0]
            for name, flags in right.items():
                flags.append(getattr(verdict, name))
    for name, chance in (("colour", 1 / 6), ("shape", 1 / 5), ("motion", 1 / 8)):
        assert abs(np.mean(right[name]) - chance) < 0.12, (name, np.mean(right[name]))


def test_every_attribute_is_judged_for_itself():
    clip = world.render(world.parse_caption("a large red circle moves right on a dark background"))
    asked = {
        "colour": "a large blue circle moves right on a dark background",
        "shape": "a large red square moves right on a dark background",
        "motion": "a large red circle moves left on a dark background",
        "size": "a small red circle moves right on a dark background",
    }
    for wrong, text in asked.items():
        verdict = judge(clip, text)
        assert [name for name in OBJECT_ATTRIBUTES if not getattr(verdict.objects[0], name)] == [wrong]
        assert verdict.share(wrong) == 0.0
        assert verdict.background
    assert not judge(clip, "a large red circle moves right on a light background").background


@pytest.mark.parametrize("level", [*world.BACKGROUNDS.values(), (0, 0, 0), (255, 255, 255)])
def test_an_empty_clip_scores_nothing(level):
    clip = np.empty((9, 64, 64, 3), np.uint8)
    clip[:] = level
    for name in world.BACKGROUNDS:
        verdict = judge(clip, f"a red circle stays still on a {name} background")
        assert not any(getattr(verdict.objects[0], attribute) for attribute in OBJECT_ATTRIBUTES)
        assert not verdict.background
        assert not verdict.count
        assert verdict.consistency == 0.0


def test_noise_scores_nothing():
    clip = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
    verdict = judge(clip, "a red circle stays still on a gray background")
    assert not (verdict.objects[0].shape and verdict.objects[0].colour)


def test_an_object_that_is_seldom_there_is_wrong():
    clip = world.render(world.parse_caption("a red circle stays still on a dark background"))
    clip[8:] = world.BACKGROUNDS["dark"]
    assert not judge(clip, "a red circle stays still on a dark background").objects[0].colour


def test_an_object_too_many_or_too_few_is_told():
    pair = "a red circle moves right and a blue square stays still on a dark background"
    one = "a red circle moves right on a dark background"
    assert judge(world.render(world.parse_caption(pair)), pair).count
    assert not judge(world.render(world.parse_caption(pair)), one).count
    missing = judge(world.render(world.parse_caption(one)), pair)
    assert not missing.count
    assert missing.share("colour") == 0.5
    assert missing.consistency < 0.55


def test_flicker_consistency_and_motion_are_measured():
    text = "a red circle moves right on a dark background"
    clip = world.render(world.parse_caption(text))
    calm = judge(clip, text)
    assert calm.flicker == 0.0
    assert calm.consistency > 0.95
    assert calm.motion_amount == pytest.approx(world.TRAVEL, abs=0.06)
    assert judge(noisy(clip, np.random.default_rng(0)), text).flicker > 3
    changing = clip.copy()
    changing[::2] = world.render(world.parse_caption("a red cross moves right on a dark background"))[::2]
    assert judge(changing, text).consistency < calm.consistency - 0.1
    still = judge(world.render(world.parse_caption("a red circle stays still on a dark background")), text)
    assert still.motion_amount < 0.02


def test_a_single_image_has_no_motion():
    scene = world.parse_caption("a red circle stays still on a dark background")
    verdict = judge(world.render(scene, 1), scene)
    assert verdict.objects[0].shape
    assert not verdict.objects[0].motion
    assert verdict.flicker == 0.0
    assert verdict.motion_amount == 0.0


def test_objects_come_largest_first_with_their_track():
    scene = world.parse_caption("a small red circle moves right and a blue square stays still on a dark background")
    blue, red = find_objects(world.render(scene))
    assert (blue.colour, red.colour) == ("blue", "red")
    expected = world.trajectories(scene, np.linspace(0, 1, 29, dtype=np.float32))
    assert np.abs(red.track - expected[0]).max() < 0.01
    assert np.abs(blue.track - expected[1]).max() < 0.01


def test_an_unknown_background_is_none():
    assert read_background(np.zeros((2, 16, 16, 3), np.uint8) + np.array([255, 0, 255], np.uint8)) is None


@pytest.mark.parametrize(
    ("clip", "text", "message"),
    [
        (np.zeros((3, 16, 16, 3), np.uint8), "a dog", "one of the tiny world's"),
        (np.zeros((3, 16, 16, 3), np.float32), "a red ring grows on a dark background", "uint8 .T, H, W, 3."),
        (np.zeros((16, 16, 3), np.uint8), "a red ring grows on a dark background", "uint8 .T, H, W, 3."),
        (np.zeros((0, 16, 16, 3), np.uint8), "a red ring grows on a dark background", "T >= 1"),
    ],
)
def test_bad_input_is_refused(clip, text, message):
    with pytest.raises(GenAttnError, match=message):
        judge(clip, text)


def read_back(kinds, frames, size=64, damage=lambda clip, rng: clip, count=25, endless=None):
    rng = np.random.default_rng(0)
    right = []
    for seed in range(count):
        scene = world.sample_scene(seed, seed % 2 == 1, 0.25, tuple(kinds))
        verdict = judge(damage(world.render(scene, frames, size, size), rng), scene, endless)
        right += [thing.motion for thing in verdict.objects]
    return np.mean(right)


@pytest.mark.parametrize(("size", "frames"), [(64, 5), (96, 9), (48, 16), (64, 29), (64, 61)])
def test_endless_motions_are_read_off_their_track_and_no_other_is_taken_for_one(size, frames):
    assert read_back(world.ENDLESS, frames, size) == 1.0
    assert read_back(world.MOTIONS, frames, size, endless=True) == 1.0


@pytest.mark.parametrize("damage", [blurred, noisy, tinted])
def test_endless_motions_are_read_through_damage(damage):
    assert read_back(world.ENDLESS, 29, damage=damage) >= 0.95
    assert read_back(world.MOTIONS, 29, damage=damage, endless=True) >= 0.95


@pytest.mark.parametrize("motion", list(world.ENDLESS))
def test_every_look_of_an_endless_motion_is_read(motion):
    for colour, shape, size in itertools.product(world.COLOURS, world.SHAPES, world.SIZES):
        scene = world.Scene((world.TinyObject(colour, shape, motion, size, phase=0.2),), "gray")
        read = judge(world.render(scene, 12), scene).objects[0].read
        assert (read.colour, read.motion) == (colour, motion), scene


def test_without_being_asked_for_an_endless_motion_is_read_as_one_of_the_eight_or_none():
    clip = world.render(world.parse_caption("a red circle moves left and right on a dark background"))
    asked = "a red circle moves left on a dark background"
    assert judge(clip, asked).objects[0].read.motion not in world.ENDLESS
    assert judge(clip, asked, endless=True).objects[0].read.motion == "sways"
    few = world.render(world.parse_caption("a red circle moves left and right on a dark background"), 4)
    assert judge(few, asked, endless=True).objects[0].read.motion not in world.ENDLESS


def test_the_smallest_clip_there_is_and_what_is_none() -> None:
    check_clip(np.zeros((1, 8, 8, 3), np.uint8))
    for shape in ((1, 7, 8, 3), (1, 8, 7, 3), (0, 8, 8, 3), (1, 8, 8, 4), (8, 8, 3)):
        with pytest.raises(GenAttnError, match="T >= 1 and H, W >= 8, got uint8"):
            check_clip(np.zeros(shape, np.uint8))
    with pytest.raises(GenAttnError, match="a clip must be uint8 .*, got float32"):
        check_clip(np.zeros((1, 8, 8, 3), np.float32))  # type: ignore[arg-type]


def test_the_background_is_the_median_of_a_rim_of_two_pixels() -> None:
    clip = np.full((1, 8, 8, 3), 200, np.uint8)
    rim = np.ones((8, 8), bool)
    rim[2:-2, 2:-2] = False
    clip[0, rim] = np.repeat([[10], [20]], 24, 0)  # as many of either: one pixel more and the median is no longer between
    assert background_colour(clip).tolist() == [15.0] * 3


@pytest.mark.parametrize("shift", [0.0, 51.0, 255.0])
def test_a_subject_that_changes_its_colour_is_less_consistent(shift: float) -> None:
    """The outline stays, the colour of the second half is `shift` away in one channel of 255."""
    mask = np.zeros((4, 16, 16), np.float32)
    mask[:, 5:11, 5:11] = 1
    frames = np.tile(np.float32([0, 128, 128]), (4, 1))
    frames[2:, 0] += shift
    track = np.tile(np.float32([0.5, 0.5, 0.2]), (4, 1))
    thing = FoundObject("red", np.float32([0, 128, 128]), mask, np.ones(4, bool), track, frames)
    assert subject_consistency(thing) == pytest.approx(1 - shift / 255 / 2, abs=1e-6)
