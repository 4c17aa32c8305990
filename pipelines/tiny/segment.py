"""Find the objects of a tiny-world clip: which colours, which pixels, where they go. No learned weights.

background   median colour of the frame's rim over the whole clip
pixel        = background + alpha (colour - background): the palette colour that leaves the least residual
object       a palette colour with enough pixels that are mostly covered
mask         alpha in and just around those pixels: soft, hence area and centre at sub-pixel precision
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.world import COLOURS

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

CORE_ALPHA = 0.5
MIN_CONTRAST = 40.0
MIN_AREA = 0.006
MIN_SHARE = 0.25


@dataclass(frozen=True)
class FoundObject:
    """One object of a clip.

    Attributes:
        colour: the palette colour nearest to what was seen.
        rgb: the mean colour seen, [3], 0 to 255.
        mask: [T, H, W] coverage in [0, 1].
        visible: [T] whether the object is there in a frame.
        track: [T, 3] centre x, centre y (fractions of the frame) and equal-area radius (fraction of the shorter side).
        frame_rgb: [T, 3] mean colour in each frame.
    """

    colour: str
    rgb: Floats
    mask: Floats
    visible: Bools
    track: Floats
    frame_rgb: Floats


def check_clip(clip: npt.NDArray[np.uint8]) -> None:
    """Refuse what is no clip.

    Raises:
        GenAttnError: unless the clip is uint8 [T, H, W, 3] with T >= 1 and H, W >= 8.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or min(clip.shape[1:3]) < 8 or not len(clip):
        raise GenAttnError(
            f"a clip must be uint8 [T, H, W, 3] with T >= 1 and H, W >= 8, got {clip.dtype} {clip.shape}; "
            "round and stack its frames"
        )


def background_colour(clip: npt.NDArray[np.uint8]) -> Floats:
    """Median colour of the rim, two pixels wide, over all frames: float32 [3]."""
    rim = np.ones(clip.shape[1:3], bool)
    rim[2:-2, 2:-2] = False
    return np.median(clip[:, rim].reshape(-1, 3), axis=0).astype(np.float32)


def find_objects(clip: npt.NDArray[np.uint8], limit: int = 3) -> list[FoundObject]:
    """Objects of a clip, largest first.

    Args:
        clip: uint8 [T, H, W, 3].
        limit: at most how many.

    Raises:
        GenAttnError: if `clip` is no clip.
    """
    check_clip(clip)
    background = background_colour(clip)
    difference = clip.astype(np.float32) - background
    names = list(COLOURS)
    alphas, label = _unmix(difference, background)
    strong = np.linalg.norm(difference, axis=-1) > MIN_CONTRAST
    cores = [strong & (label == index) & (alphas[index] > CORE_ALPHA) for index in range(len(names))]
    cores = [_without_specks(core) for core in cores]
    masses = np.array([core.mean() for core in cores])
    order = [int(index) for index in np.argsort(-masses)[:limit]]
    kept = [index for index in order if masses[index] > max(MIN_AREA * 0.5, MIN_SHARE * masses[order[0]])]
    taken = np.any([cores[index] for index in kept], axis=0) if kept else np.zeros(label.shape, bool)
    found = (_measure(names[index], alphas[index], cores[index], taken & ~cores[index], clip) for index in kept)
    return [thing for thing in found if thing.visible.any()]


def dilate(mask: Floats, reach: int) -> Floats:
    """The largest value within `reach` pixels, along rows and columns: [T, H, W] to [T, H, W]."""
    widened: Floats = F.max_pool2d(torch.from_numpy(mask)[:, None], 2 * reach + 1, 1, reach)[:, 0].numpy()
    return widened


def _unmix(difference: Floats, background: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Coverage by each colour [6, T, H, W], and the index of the colour that explains a pixel best [T, H, W]."""
    directions = np.array(list(COLOURS.values()), np.float32) - background
    products, lengths = difference @ directions.T, np.square(directions).sum(1)
    alphas = (products / lengths).clip(0.0, 1.3)
    # the residual |d - a c|^2, but for |d|^2, which is the same for every colour
    label = np.argmin(alphas**2 * lengths - 2 * alphas * products, axis=-1)
    return np.moveaxis(alphas.clip(0.0, 1.0), -1, 0), label


def _without_specks(core: Bools) -> Bools:
    """Keep the pixels of which at least half of the 3 x 3 neighbourhood is core too."""
    share = F.avg_pool2d(torch.from_numpy(core.astype(np.float32))[:, None], 3, 1, 1)[:, 0].numpy()
    return core & (share > 0.5)


def _measure(colour: str, alpha: Floats, core: Bools, others: Bools, clip: npt.NDArray[np.uint8]) -> FoundObject:
    around = dilate(core.astype(np.float32), 2) > 0
    around &= ~others
    mask = np.where(around, alpha, 0.0).astype(np.float32)
    _, height, width = mask.shape
    area = mask.sum((1, 2))
    visible = area > MIN_AREA * 0.5 * height * width
    total = np.maximum(area, 1e-6)
    x = (mask * (np.arange(width) + 0.5)).sum((1, 2)) / total / width
    y = (mask * (np.arange(height) + 0.5)[:, None]).sum((1, 2)) / total / height
    radius = np.sqrt(area / np.pi) / min(height, width)
    weight = np.where(core, mask**4, 0.0)[..., None]
    frame_rgb = (weight * clip).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1e-6)
    rgb = np.median(frame_rgb[visible], axis=0) if visible.any() else np.zeros(3)
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name]) if visible.any() else colour
    track = np.stack([x, y, radius], 1).astype(np.float32)
    return FoundObject(nearest, rgb.astype(np.float32), mask, visible, track, frame_rgb.astype(np.float32))
