"""The tiny world: captioned clips of coloured shapes that move, drawn from a seed.

    seed -> Scene (objects + background) -> caption(scene)            "a red circle moves right on a dark background"
                                         -> render(scene, 29, 64, 64)  uint8 [29, 64, 64, 3]

Every caption has exactly one meaning (`parse_caption` reads it back), so that an oracle can check a generated clip
against what was asked. One in eight colour x shape x motion combinations is held out and never sampled for training.
The motions of `MOTIONS` fit into one clip, and all but the orbit end with it; those of `ENDLESS` go on for ever. They are drawn
only where they are asked for.
Positions are fractions of the frame, radii fractions of its shorter side, time a fraction of the clip: any number of
frames and any size show the same scene. All shapes of one size cover the same area.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from genattn.errors import GenAttnError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 45),
    "green": (40, 185, 60),
    "blue": (45, 75, 235),
    "yellow": (245, 215, 40),
    "purple": (190, 50, 215),
    "cyan": (40, 210, 225),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS: dict[str, str] = {
    "still": "stays still",
    "right": "moves right",
    "left": "moves left",
    "up": "moves up",
    "down": "moves down",
    "grows": "grows",
    "shrinks": "shrinks",
    "orbits": "orbits",
}
# each begins where it ends, once round in a clip, so that a film of any length can go on with it
ENDLESS: dict[str, str] = {"sways": "moves left and right", "bobs": "moves up and down", "pulses": "grows and shrinks"}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"dark": (24, 24, 32), "gray": (122, 122, 126), "light": (232, 232, 226)}
SIZES: dict[str, float] = {"small": 0.11, "medium": 0.15, "large": 0.2}

TRAVEL = 0.45
LANE_TRAVEL = 0.2
ORBIT_RADIUS = 0.17
LANE_ORBIT_RADIUS = 0.1
GROWTH = 0.35
_HORIZONTAL, _VERTICAL = ("left", "right", "sways"), ("up", "down", "bobs")
_SIZED = ("grows", "shrinks", "pulses")
_ALL_MOTIONS = MOTIONS | ENDLESS

UInt8Clip = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TinyObject:
    """One coloured shape.

    Attributes:
        colour: a key of `COLOURS`.
        shape: one of `SHAPES`.
        motion: a key of `MOTIONS` or `ENDLESS`.
        size: a key of `SIZES`; a caption names it unless it is "medium".
        offset: (x, y) displacement from the usual place, fractions of the frame in [-0.5, 0.5]; no part of a caption.
        phase: where an orbit or an endless motion begins, in turns; no part of a caption.
    """

    colour: str
    shape: str
    motion: str
    size: str = "medium"
    offset: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    phase: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("colour", self.colour, COLOURS),
            ("shape", self.shape, SHAPES),
            ("motion", self.motion, _ALL_MOTIONS),
            ("size", self.size, SIZES),
        ):
            if value not in known:
                raise GenAttnError(f"{name} must be one of {', '.join(known)}, got {value!r}; choose one of those")
        if len(self.offset) != 2 or not all(abs(v) <= 0.5 for v in self.offset):
            raise GenAttnError(f"offset must be two fractions in [-0.5, 0.5], got {self.offset}; give (x, y)")

    @property
    def combination(self) -> tuple[str, str, str]:
        """(colour, shape, motion), the unit in which held-out examples are counted."""
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class Scene:
    """One or two objects of different colours on a plain background.

    Attributes:
        objects: the objects in the order in which the caption names them.
        background: a key of `BACKGROUNDS`.
    """

    objects: tuple[TinyObject, ...]
    background: str

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise GenAttnError(f"a scene must have 1 or 2 objects, got {len(self.objects)}; add or drop some")
        if len({thing.colour for thing in self.objects}) != len(self.objects):
            raise GenAttnError(f"objects must differ in colour, got {self.objects[0].colour} twice; change one")
        if self.background not in BACKGROUNDS:
            raise GenAttnError(
                f"background must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}; choose one of those"
            )


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether a combination is kept from training: one in eight, 30 of the 240.

    Exactly one of `MOTIONS` for each colour and shape; the same rule, counted on, holds out 11 of the 90 with an endless
    motion.

    Args:
        colour: a key of `COLOURS`.
        shape: one of `SHAPES`.
        motion: a key of `MOTIONS` or `ENDLESS`.

    Raises:
        GenAttnError: for an unknown word.
    """
    thing = TinyObject(colour, shape, motion)
    place = (list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), list(_ALL_MOTIONS).index(thing.motion))
    return (5 * place[0] + 3 * place[1] + place[2]) % len(MOTIONS) == 0


def sample_scene(seed: int, held_out: bool = False, two_objects: float = 0.2, motions: Sequence[str] = tuple(MOTIONS)) -> Scene:
    """Draw a scene; the same seed and settings give the same scene on every machine.

    Args:
        seed: any integer >= 0.
        held_out: draw the (first) object from the held-out combinations; else none of the objects is held out.
        two_objects: share of two-object scenes, in [0, 1].
        motions: what to draw from, keys of `MOTIONS` and `ENDLESS`.

    Raises:
        GenAttnError: for a negative seed, a share outside [0, 1], or motions that are none.
    """
    if seed < 0:
        raise GenAttnError(f"seed must be >= 0, got {seed}; use a non-negative integer")
    if not 0.0 <= two_objects <= 1.0:
        raise GenAttnError(f"two_objects must be in [0, 1], got {two_objects}; give a share of the scenes")
    if not motions or not set(motions) <= set(_ALL_MOTIONS):
        raise GenAttnError(f"motions must be some of {', '.join(_ALL_MOTIONS)}, got {list(motions)}; name those to draw from")
    rng = np.random.default_rng([seed, int(held_out)])
    background = _pick(rng, tuple(BACKGROUNDS))
    pair = bool(rng.random() < two_objects)
    while True:
        first = _sample_object(rng, held_out, pair, motions)
        if not pair:
            return Scene((first,), background)
        second = _sample_object(rng, False, pair, motions)
        if first.colour != second.colour and _share_lanes(first.motion, second.motion):
            return Scene((first, second), background)


def settle(scene: Scene) -> Scene:
    """The same scene with every object at its usual place and orbits begun at the same point: all that its caption says."""
    return Scene(tuple(replace(thing, offset=(0.0, 0.0), phase=0.0) for thing in scene.objects), scene.background)


def caption(scene: Scene) -> str:
    """The one sentence that describes a scene, e.g. "a red circle moves right on a dark background"."""
    phrases = []
    for thing in scene.objects:
        size = "" if thing.size == "medium" else f"{thing.size} "
        phrases.append(f"a {size}{thing.colour} {thing.shape} {_ALL_MOTIONS[thing.motion]}")
    return f"{' and '.join(phrases)} on a {scene.background} background"


def parse_caption(text: str) -> Scene | None:
    """Read a caption back into a scene (objects at their usual places); None where it is no sentence of this world."""
    match = re.fullmatch(r"(.+?) on an? (\w+) background", " ".join(text.lower().split()).rstrip(" ."))
    if match is None or match[2] not in BACKGROUNDS:
        return None
    objects = [_parse_object(phrase) for phrase in re.split(r" and (?=an? )", match[1])]
    found = tuple(thing for thing in objects if thing is not None)
    if len(found) != len(objects) or len(found) > 2 or len({thing.colour for thing in found}) != len(found):
        return None
    return Scene(found, match[2])


def render(scene: Scene, frames: int = 29, height: int = 64, width: int = 64) -> UInt8Clip:
    """Draw a scene, anti-aliased.

    Args:
        scene: what to draw.
        frames: number of frames T >= 1; one frame shows the middle of the clip.
        height: pixels H >= 8.
        width: pixels W >= 8.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        GenAttnError: for fewer than 1 frame or 8 pixels.
    """
    if frames < 1 or height < 8 or width < 8:
        raise GenAttnError(f"frames must be >= 1, height and width >= 8, got {frames} frames of {height}x{width}; ask for more")
    time = np.linspace(0.0, 1.0, frames, dtype=np.float32) if frames > 1 else np.full(1, 0.5, np.float32)
    return render_at(scene, time, height, width)


def render_at(scene: Scene, time: Floats, height: int, width: int) -> UInt8Clip:
    """Draw a scene at any moments: uint8 [T, H, W, 3] for `time` float [T], fractions of the clip in [0, 1]."""
    clip = np.empty((len(time), height, width, 3), np.float32)
    clip[:] = BACKGROUNDS[scene.background]
    for thing, track in zip(scene.objects, trajectories(scene, time), strict=True):
        scale = np.array([width, height, min(width, height)], np.float32)
        alpha = coverage(thing.shape, track * scale, height, width)[..., None]
        clip += alpha * (np.asarray(COLOURS[thing.colour], np.float32) - clip)
    return np.round(clip).astype(np.uint8)


def trajectories(scene: Scene, time: Floats) -> list[Floats]:
    """Where each object is: per object a float32 [T, 3] of centre x, centre y and radius, fractions of the frame.

    Args:
        scene: the scene.
        time: float [T], fractions of the clip in [0, 1].
    """
    if len(scene.objects) == 1:
        thing = scene.objects[0]
        return [_trajectory(thing, (0.5, 0.5), time, (TRAVEL, TRAVEL), ORBIT_RADIUS)]
    stacked = not any(thing.motion in _VERTICAL for thing in scene.objects)
    tracks = []
    for lane, thing in zip((0.26, 0.74), scene.objects, strict=True):
        centre = (0.5, lane) if stacked else (lane, 0.5)
        travel = (TRAVEL, LANE_TRAVEL) if stacked else (LANE_TRAVEL, TRAVEL)
        tracks.append(_trajectory(thing, centre, time, travel, LANE_ORBIT_RADIUS))
    return tracks


def coverage(shape: str, track: Floats, height: int, width: int) -> Floats:
    """How much of each pixel a shape covers.

    Args:
        shape: one of `SHAPES`.
        track: float [T, 3], centre x, centre y and equal-area radius in pixels.
        height: pixels H.
        width: pixels W.

    Returns:
        float32 [T, H, W] in [0, 1].
    """
    centre_x, centre_y, radius = (np.asarray(track, np.float32)[:, i, None, None] for i in range(3))
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - centre_x
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - centre_y
    return np.clip(0.5 - _signed_distance(shape, x, y, radius), 0.0, 1.0).astype(np.float32)


def _signed_distance(shape: str, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Pixels to the outline, negative inside; the outline encloses an area of pi * radius^2."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        outer: Any = radius / math.sqrt(0.7)
        inner = outer * math.sqrt(0.3)
        return np.abs(np.hypot(x, y) - (outer + inner) / 2) - (outer - inner) / 2
    if shape == "square":
        half = radius * (math.sqrt(math.pi) / 2)
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "cross":
        long, short = radius * math.sqrt(9 * math.pi / 20), radius * math.sqrt(math.pi / 20)
        bar = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(bar, np.maximum(np.abs(x) - short, np.abs(y) - long))
    inscribed = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
    slope = math.sqrt(3) / 2 * np.abs(x) - y / 2
    return np.maximum(y + 0 * x, slope) - inscribed


def _trajectory(
    thing: TinyObject, centre: tuple[float, float], time: Floats, travel: tuple[float, float], orbit: float
) -> Floats:
    """float32 [T, 3]: x, y, radius of one object around its usual place."""
    angle = 2 * math.pi * (time + thing.phase)
    # from -1/2 to 1/2 to the right, downwards or larger; an endless one goes there and back, the caption's first word first
    along = (time - 0.5) * (1 if thing.motion in ("right", "down", "grows") else -1)
    if thing.motion in ENDLESS:
        along = np.cos(angle) * (-0.5 if thing.motion == "pulses" else 0.5)
    x, y = np.zeros_like(time), np.zeros_like(time)
    radius = np.full_like(time, SIZES[thing.size])
    if thing.motion in _HORIZONTAL:
        x = along * travel[0]
    elif thing.motion in _VERTICAL:
        y = along * travel[1]
    elif thing.motion in _SIZED:
        radius = radius * (1 + 2 * GROWTH * along)
    elif thing.motion == "orbits":
        x, y = orbit * np.cos(angle), orbit * np.sin(angle)
    return np.stack([x + centre[0] + thing.offset[0], y + centre[1] + thing.offset[1], radius], 1).astype(np.float32)


def _sample_object(rng: np.random.Generator, held_out: bool, pair: bool, motions: Sequence[str]) -> TinyObject:
    while True:
        combination = _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES), _pick(rng, motions)
        if is_held_out(*combination) == held_out:
            break
    motion = combination[2]
    size = _pick(rng, ("small", "medium") if pair else ("small", "medium", "medium", "large"))
    # room to wander: across a straight path there is more of it than along, or around an orbit
    roomy = 0.14 - 0.4 * max(SIZES[size] - 0.11, 0.0)
    reach_x = 0.04 if motion in (*_HORIZONTAL, "orbits", *_SIZED) else roomy
    reach_y = 0.04 if motion in (*_VERTICAL, "orbits", *_SIZED) else roomy
    if pair:
        reach_x = reach_y = 0.015
    offset = (round(float(rng.uniform(-reach_x, reach_x)), 4), round(float(rng.uniform(-reach_y, reach_y)), 4))
    return TinyObject(*combination, size, offset, round(float(rng.random()), 4))


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _share_lanes(first: str, second: str) -> bool:
    """Whether two motions fit side by side: one across and one up or down would cross each other's lane."""
    return not any(a in _HORIZONTAL and b in _VERTICAL for a, b in ((first, second), (second, first)))


def _parse_object(phrase: str) -> TinyObject | None:
    sizes, motions = "|".join(SIZES), "|".join(_ALL_MOTIONS.values())
    pattern = rf"an? (?:({sizes}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({motions})"
    match = re.fullmatch(pattern, phrase)
    if match is None:
        return None
    motion = next(name for name, verb in _ALL_MOTIONS.items() if verb == match[4])
    return TinyObject(match[2], match[3], motion, match[1] or "medium")
