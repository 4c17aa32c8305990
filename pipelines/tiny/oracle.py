"""Judge a clip against its caption: is the asked colour, shape, motion, size and background there, and is it steady?

Everything is measured (`segment`), nothing learned. A shape is the template of the same area and centre with the
highest overlap; a motion is read off the track of centre and radius, as one of the eight, and as an endless one only where
such may be asked for. An object that is missing, or there in less than seven frames of ten, is wrong in everything, so an
empty clip scores nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.segment import Floats, FoundObject, background_colour, dilate, find_objects
from genattn.pipelines.tiny.world import BACKGROUNDS, ENDLESS, SHAPES, SIZES, Scene, TinyObject, coverage, parse_caption

MIN_VISIBLE = 0.7
MIN_OVERLAP = 0.6
MAX_BACKGROUND_DISTANCE = 60.0
GROWTH_THRESHOLD = 0.3
TRAVEL_THRESHOLD = 0.1
ORBIT_THRESHOLD = 0.05
STILL_THRESHOLD = 0.035
SWING_THRESHOLD = 0.07
PULSE_THRESHOLD = 0.15
MIN_ENDLESS_FRAMES = 5


@dataclass(frozen=True)
class Reading:
    """What an object is, by measurement; None where it cannot be told."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class ObjectVerdict:
    """Which asked attributes of one object are there."""

    asked: TinyObject
    read: Reading
    colour: bool
    shape: bool
    motion: bool
    size: bool


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of a clip.

    Attributes:
        objects: one verdict for each asked object, in the caption's order.
        background: whether the asked background is there (never without an object).
        count: whether there are as many objects as asked.
        consistency: how far the subjects stay themselves (outline and colour) over the frames, in [0, 1].
        flicker: mean change of background pixels from frame to frame, in 8-bit levels, >= 0.
        motion_amount: mean path length of the centres, in frame sides, plus total change of log radius.
    """

    objects: tuple[ObjectVerdict, ...]
    background: bool
    count: bool
    consistency: float
    flicker: float
    motion_amount: float

    def share(self, attribute: str) -> float:
        """Share of the asked objects whose `attribute` (colour, shape, motion or size) is right."""
        return float(np.mean([getattr(thing, attribute) for thing in self.objects]))


def judge(clip: npt.NDArray[np.uint8], asked: str | Scene, endless: bool | None = None) -> Verdict:
    """Judge a clip.

    Args:
        clip: uint8 [T, H, W, 3]; motion needs T >= 3.
        asked: the caption or the scene.
        endless: whether a motion may be read as an endless one; None where one is asked for.

    Raises:
        GenAttnError: for a caption that is no sentence of the world, or what is no clip.
    """
    scene = parse_caption(asked) if isinstance(asked, str) else asked
    if scene is None:
        raise GenAttnError(
            f"the caption must be one of the tiny world's, got {asked!r}; "
            "say e.g. 'a red circle moves right on a dark background'"
        )
    found = find_objects(clip)
    present = [thing for thing in found if thing.visible.mean() >= MIN_VISIBLE]
    matched = _match(scene, present)
    endless = any(thing.motion in ENDLESS for thing in scene.objects) if endless is None else endless
    objects = tuple(_judge_object(thing, match, endless) for thing, match in zip(scene.objects, matched, strict=True))
    steady = [subject_consistency(thing) for thing in matched if thing is not None]
    moved = [motion_amount(thing) for thing in matched if thing is not None]
    return Verdict(
        objects=objects,
        background=bool(present) and read_background(clip) == scene.background,
        count=len(present) == len(scene.objects),
        consistency=sum(steady) / len(scene.objects),
        flicker=flicker(clip, found),
        motion_amount=float(np.mean(moved)) if moved else 0.0,
    )


def read_background(clip: npt.NDArray[np.uint8]) -> str | None:
    """The background nearest to the rim's colour, None if none is near."""
    colour = background_colour(clip)
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in BACKGROUNDS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < MAX_BACKGROUND_DISTANCE else None


def read_object(thing: FoundObject, endless: bool = False) -> Reading:
    """Colour, shape, motion (an endless one too where `endless`) and size of a found object."""
    radius = float(np.median(thing.track[thing.visible, 2]))
    size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    return Reading(thing.colour, read_shape(thing), read_motion(thing, endless), size)


def read_shape(thing: FoundObject) -> str | None:
    """The shape whose template of the same area and centre overlaps most, None if none does well.

    Frames in which the object is cut by the frame's edge are left out, unless it always is.
    """
    _, height, width = thing.mask.shape
    rim = np.ones((height, width), bool)
    rim[1:-1, 1:-1] = False
    whole = thing.visible & (thing.mask[:, rim].max(1) < 0.5)
    use = whole if whole.any() else thing.visible
    track = thing.track[use] * np.array([width, height, min(width, height)], np.float32)
    mask = thing.mask[use]
    overlap = {}
    for shape in SHAPES:
        template = coverage(shape, track, height, width)
        overlap[shape] = float(np.mean(np.minimum(mask, template).sum((1, 2)) / np.maximum(mask, template).sum((1, 2))))
    best = max(overlap, key=lambda name: overlap[name])
    return best if overlap[best] >= MIN_OVERLAP else None


def read_motion(thing: FoundObject, endless: bool = False) -> str | None:
    """The motion that the track shows, None if it is none of the world's or there are fewer than 3 frames.

    Args:
        thing: the object.
        endless: whether it may be one of `ENDLESS`; without, one of `MOTIONS` alone.
    """
    if thing.visible.sum() < 3:
        return None
    goes_on = read_endless(thing) if endless else None
    if goes_on is not None:
        return goes_on
    time = np.linspace(0.0, 1.0, len(thing.visible))[thing.visible]
    x, y, radius = thing.track[thing.visible].astype(np.float64).T
    slope, spread = _fit(time[:, None] - 0.5, np.stack([x, y], 1))
    growth = _fit(time[:, None] - 0.5, radius[:, None])[0][0, 0] / radius.mean()
    travel = slope[0]
    if abs(growth) > GROWTH_THRESHOLD and np.abs(travel).max() < 2 * TRAVEL_THRESHOLD:
        return "grows" if growth > 0 else "shrinks"
    turn = np.stack([np.cos(2 * np.pi * time), np.sin(2 * np.pi * time)], 1)
    harmonic, spread_of_orbit = _fit(turn, np.stack([x, y], 1))
    # on a circle run once the two rows are perpendicular and equally long, whatever the phase
    amplitude = np.sqrt(abs(np.linalg.det(harmonic)))
    if amplitude > ORBIT_THRESHOLD and spread_of_orbit < spread:
        return "orbits"
    across, along = sorted(np.abs(travel))
    if along > TRAVEL_THRESHOLD:
        if across > 0.6 * along:
            return None
        axis = int(np.argmax(np.abs(travel)))
        return (("left", "right"), ("up", "down"))[axis][int(travel[axis] > 0)]
    return "still" if np.hypot(x - x.mean(), y - y.mean()).mean() < STILL_THRESHOLD else None


def read_endless(thing: FoundObject) -> str | None:
    """The endless motion that the track shows, once round in the clip; None for any other, or fewer than 5 frames.

    Back and forth is a swing along one axis, where an orbit swings along both, and each must tell more of the track than
    a straight line does.
    """
    if thing.visible.sum() < MIN_ENDLESS_FRAMES:
        return None
    time = np.linspace(0.0, 1.0, len(thing.visible))[thing.visible]
    x, y, radius = thing.track[thing.visible].astype(np.float64).T
    turn = np.stack([np.cos(2 * np.pi * time), np.sin(2 * np.pi * time)], 1)
    swing, better = [], []
    for values in (x, y, radius / radius.mean()):
        wave, rest = _fit(turn, values[:, None])
        swing.append(float(np.hypot(wave[0, 0], wave[1, 0])))
        better.append(rest < _fit(time[:, None], values[:, None])[1])
    axis = int(swing[1] > swing[0])
    if swing[axis] > SWING_THRESHOLD:
        return ("sways", "bobs")[axis] if better[axis] and swing[1 - axis] < 0.5 * swing[axis] else None
    return "pulses" if swing[2] > PULSE_THRESHOLD and better[2] else None


def subject_consistency(thing: FoundObject) -> float:
    """Mean over frames of outline overlap with the mean outline times colour agreement; absent frames count 0."""
    outlines = _canonical(thing)
    mean = outlines.mean(0)
    overlap = np.minimum(outlines, mean).sum((1, 2)) / np.maximum(outlines, mean).sum((1, 2))
    drift = np.linalg.norm(thing.frame_rgb[thing.visible] - thing.rgb, axis=1) / 255.0
    return float((overlap * np.clip(1.0 - drift, 0.0, 1.0)).sum() / len(thing.visible))


def motion_amount(thing: FoundObject) -> float:
    """Path length of the centre, in frame sides, plus total change of log radius, over the visible frames."""
    track = thing.track[thing.visible].astype(np.float64)
    if len(track) < 2:
        return 0.0
    # a three-frame mean: sub-pixel jitter is no motion
    kernel = np.ones(3) / 3
    smooth = np.stack([np.convolve(c, kernel, "valid") for c in track.T], 1) if len(track) >= 3 else track
    steps = np.diff(smooth, axis=0)
    return float(np.hypot(steps[:, 0], steps[:, 1]).sum() + np.abs(np.diff(np.log(smooth[:, 2]))).sum())


def flicker(clip: npt.NDArray[np.uint8], found: list[FoundObject]) -> float:
    """Mean absolute change, in 8-bit levels, of the pixels that no object is near in two successive frames."""
    if len(clip) < 2:
        return 0.0
    near = np.zeros(clip.shape[:3], bool)
    for thing in found:
        near |= dilate(thing.mask, 3) > 0.02
    free = ~(near[1:] | near[:-1])
    change = np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(-1)
    return float(change[free].mean()) if free.any() else float(change.mean())


def _judge_object(asked: TinyObject, thing: FoundObject | None, endless: bool) -> ObjectVerdict:
    if thing is None:
        return ObjectVerdict(asked, Reading(), False, False, False, False)
    read = read_object(thing, endless)
    right = {name: getattr(read, name) == getattr(asked, name) for name in ("colour", "shape", "motion", "size")}
    return ObjectVerdict(asked, read, **right)


def _match(scene: Scene, present: list[FoundObject]) -> list[FoundObject | None]:
    """The found object for each asked one: by colour, what is left over by size."""
    left = list(present[: len(scene.objects)])
    matched: dict[int, FoundObject] = {}
    for index, asked in enumerate(scene.objects):
        same = next((thing for thing in left if thing.colour == asked.colour), None)
        if same is not None:
            matched[index] = same
            left = [thing for thing in left if thing is not same]
    for index in range(len(scene.objects)):
        if index not in matched and left:
            matched[index] = left.pop(0)
    return [matched.get(index) for index in range(len(scene.objects))]


def _fit(basis: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Least squares of values [T, C] on a basis [T, K] and a constant: coefficients [K, C], root-mean-square rest."""
    design = np.concatenate([basis, np.ones((len(basis), 1))], 1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return solution[:-1], float(np.sqrt(np.square(values - design @ solution).mean()))


def _canonical(thing: FoundObject) -> Floats:
    """Outlines of the visible frames, centred and scaled to one area: float32 [N, 24, 24]."""
    _, height, width = thing.mask.shape
    mask, track = torch.from_numpy(thing.mask[thing.visible])[:, None], torch.from_numpy(thing.track[thing.visible])
    line = torch.linspace(-2.0, 2.0, 24)
    grid_y, grid_x = torch.meshgrid(line, line, indexing="ij")
    reach = track[:, 2, None, None] * min(height, width)
    x = (track[:, 0, None, None] + grid_x * reach / width) * 2 - 1
    y = (track[:, 1, None, None] + grid_y * reach / height) * 2 - 1
    sampled = F.grid_sample(mask, torch.stack([x, y], -1), align_corners=False)
    outlines: Floats = sampled[:, 0].numpy()
    return outlines
