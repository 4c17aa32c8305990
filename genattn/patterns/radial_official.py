"""The block mask of the released Radial Attention code, as it is, for parity and for showing its holes.

Tokens of a frame are first masked one by one, then shrunk to blocks of the sequence, and the blocks are OR-ed together:

    window      frames up to 1 apart: all;  else |k - l| <= max(2^floor(log2 s) / 2^r * decay, block)
    skip        with L = 2^floor(log2 s) / 2^r: keep every frame if L >= 128, else only d mod int(128 / L) = 0
    shrink      a block is on iff more than 60 % of its non-empty columns are on in more than a third of its rows

The shrinking drops a frame's last block when the frame's offset pushes it past ceil(s / block): some query blocks then have no
key at all. Sizes that the code cannot run (video tokens not divisible by the block) are defined by the ceil form: one more,
partial, block whose row and column are dense. Everything beyond the last whole block (text included) is dense.
"""

from collections.abc import Sequence

import numpy as np
import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.element_rule import BlockRule

_SKIP_BELOW = 128


def official_rule(
    layout: TokenLayout, decays: Sequence[float], block: int, model: str, sink: bool, half_window: bool
) -> BlockRule:
    """The mask as a rule over the places of the grid tokens; text, references and registers are global."""
    frames, height, width = layout.grid3
    masks = [official_block_mask(frames, height * width, block, d, model, sink, half_window) for d in decays]
    plain = len(layout.segments) == 1
    place = None if plain else layout.raster_index.to(torch.int32)
    return BlockRule(torch.from_numpy(np.stack(masks)), block, place)


def official_block_mask(
    frames: int,
    per_frame: int,
    block: int = 128,
    decay: float = 0.2,
    model: str = "wan",
    sink: bool | None = None,
    half_window: bool = False,
) -> np.ndarray:
    """Bool [ceil(V / block), ceil(V / block)] over the V = frames x per_frame video tokens.

    sink None: the first frame is seen by all in "wan" only, as released since 2025-07-06.
    """
    sink = model == "wan" if sink is None else sink
    total = frames * per_frame
    blocks, patch = -(-total // block), -(-per_frame // block)
    mask = np.zeros((blocks, blocks), dtype=bool)
    offsets = np.arange(frames) * per_frame
    begin, remainder = offsets // block, offsets % block
    shrunk: dict[tuple[int, int, int], np.ndarray] = {}
    for i in range(frames):
        for j in range(frames):
            width = per_frame if sink and j == 0 else _half_width(abs(i - j), per_frame, block, decay, half_window)
            if width < 0:
                continue
            key = (int(remainder[i]), int(remainder[j]), width)
            if key not in shrunk:
                shrunk[key] = _shrink(per_frame, block, *key)
            i0, j0 = int(begin[i]), int(begin[j])
            part = mask[i0 : i0 + patch, j0 : j0 + patch]
            part |= shrunk[key][: part.shape[0], : part.shape[1]]
    mask[total // block :, :] = True
    mask[:, total // block :] = True
    return mask


def _half_width(distance: int, per_frame: int, block: int, decay: float, half_window: bool) -> int:
    """Largest |k - l| kept between frames `distance` apart, -1 where the pair is dropped."""
    length = 2 ** per_frame.bit_length() / 2 ** distance.bit_length()
    if length < _SKIP_BELOW and distance % int(_SKIP_BELOW / length):
        return -1
    if distance <= 1:
        return per_frame // 2 if distance == 1 and half_window else per_frame
    return int(max(length * decay, block))


def _shrink(per_frame: int, block: int, row_offset: int, column_offset: int, half: int) -> np.ndarray:
    """Bool [ceil(s / block), ceil(s / block)]: the frame pair's band |k - l| <= half, put at the offsets and cut to blocks."""
    patch = -(-per_frame // block)
    column = np.arange(per_frame)
    first = np.arange(patch)[:, None] * block - row_offset
    top = np.maximum(np.maximum(first, 0), column - half)
    bottom = np.minimum(np.minimum(first + block, per_frame), column + half + 1)
    rows_on = bottom - top
    edges = np.clip(np.arange(patch + 1) * block - column_offset, 0, per_frame)
    covered, touched = (np.cumsum(np.pad(c, ((0, 0), (1, 0))), axis=1)[:, edges] for c in (rows_on > block / 3, rows_on > 0))
    return np.diff(covered, axis=1) / (np.diff(touched, axis=1) + 1e-9) > 0.6
