"""Readers that find a layout in the positions a model is told, whatever the model: nothing is taken because a number fits.

    rasters        a list of token positions, image after image              img_ids of FLUX and its kin
    packed         rows of text, sound and video in one sequence             video_indices, text_indices, audio_indices
    spread_table   positions of one raster as a table of rotary angles       cos [S, D]

A raster is accepted only when its positions are those of all its places in order, last axis fastest. How far apart the
places are does not matter: positions may be fractions, and frames may be spaced unevenly.
"""

import itertools
import math
from collections.abc import Mapping

import torch

from genattn.geometry.token_layout import Segment, SegmentKind, TokenLayout

TEXT: SegmentKind = "text"
SOUND: SegmentKind = "audio"
VIDEO: SegmentKind = "reference"
OTHER: SegmentKind = "register"


def raster_shape(places: torch.Tensor) -> tuple[int, ...] | None:
    """Shape of the raster whose places are listed in order; None when the list is not one.

    places: [N, axes]. A list of one place is a raster of ones.
    """
    ranks, shape = [], []
    for column in places.unbind(dim=1):
        values, rank = column.unique(return_inverse=True)
        ranks.append(rank)
        shape.append(len(values))
    order = torch.zeros_like(ranks[0])
    for rank, n in zip(ranks, shape):
        order = order * n + rank
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return tuple(shape) if in_order and len(order) == math.prod(shape) else None


def rasters(ids: torch.Tensor, first: int) -> list[tuple[int, int]] | None:
    """Height and width of every image in a list of token positions; row and column stand in columns `first`, `first + 1`.

    ids: [N, columns] or [1, N, columns]. An image ends where the other columns change. None when one is not a full raster.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    others = torch.cat([ids[:, :first], ids[:, first + 2 :]], dim=1)
    changes = ((others[1:] != others[:-1]).any(dim=1).nonzero().flatten() + 1).tolist()
    shapes = []
    for begin, end in itertools.pairwise([0, *changes, ids.shape[0]]):
        shape = raster_shape(ids[begin:end, first : first + 2])
        if shape is None:
            return None
        shapes.append((shape[0], shape[1]))
    return shapes


def packed(
    length: int, rows: Mapping[SegmentKind, torch.Tensor], places: torch.Tensor, noise: torch.Tensor | None
) -> TokenLayout | None:
    """The layout of a sequence whose rows are told by kind: text, sound, and rasters, the last of which is made.

    length: of the sequence. rows: positions in the sequence by segment kind, "reference" for rows of video. places: [length,
    3], (t, h, w) of each row. noise: [length], rows of different noise belong to different rasters; None when there is one.

    None when a row is told twice or not at all, when a raster is not whole, or when nothing is made.
    """
    kinds = torch.full((length,), -1)
    names = list(rows)
    for number, index in enumerate(rows.values()):
        index = index.cpu()
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= length or bool((kinds[index] >= 0).any())):
            return None
        kinds[index] = number
    if bool((kinds < 0).any()) or sum(len(index) for index in rows.values()) != length:
        return None
    places, noise = places.cpu().double(), None if noise is None else noise.cpu()
    segments: list[Segment] = []
    for begin, end in _runs(kinds):
        name = names[int(kinds[begin])]
        if name != VIDEO:
            segments.append(Segment(name, (end - begin,)))
            continue
        found = _video(places[begin:end], None if noise is None else noise[begin:end])
        if found is None:
            return None
        segments += [Segment(VIDEO, shape) for shape in found]
    last = max((i for i, s in enumerate(segments) if s.kind == VIDEO), default=None)
    if last is None:
        return None
    segments[last] = Segment("grid", segments[last].shape)
    return TokenLayout(tuple(segments))


def spread_table(table: torch.Tensor) -> tuple[int, int, int] | None:
    """Frames, rows and columns of a raster from its rotary table: every channel must turn with one axis alone.

    table: [S, D], cosines or angles of the places in order. A channel first changes after one place, one row or one frame;
    every channel is then held against the raster that this tells. None when it does not hold.
    """
    differs = table != table[:1]
    moving = differs.any(dim=0)
    steps = differs[:, moving].int().argmax(dim=0).unique().tolist()
    length = table.shape[0]
    if not 1 <= len(steps) <= 3 or steps[0] != 1 or any(b % a for a, b in itertools.pairwise([*steps, length])):
        return None
    if len(steps) == 1 and len(table.unique(dim=0)) != length:
        return None  # a line has no place twice; what looks like one may be channels that turn with several axes
    shape = [b // a for a, b in itertools.pairwise([*steps, length])][::-1]
    whole = (*[1] * (3 - len(shape)), *shape)
    return whole if _separable(table[:, moving], whole) else None  # type: ignore[return-value]


def _video(places: torch.Tensor, noise: torch.Tensor | None) -> list[tuple[int, ...]] | None:
    """Rasters (frames, height, width) one behind the other; frames of one raster follow in time and have the same places."""
    new_frame = (places[1:, 0] != places[:-1, 0]) | _goes_back(places[:, 1:])
    if noise is not None:
        new_frame |= noise[1:] != noise[:-1]
    edges = [0, *(new_frame.nonzero().flatten() + 1).tolist(), len(places)]
    found: list[list[int]] = []
    before: tuple[torch.Tensor, float, int] | None = None
    for begin, end in itertools.pairwise(edges):
        spots, time = places[begin:end, 1:], float(places[begin, 0])
        shape, level = raster_shape(spots), -1 if noise is None else int(noise[begin])
        if shape is None:
            return None
        follows = before is not None and time > before[1] and level == before[2] and torch.equal(spots, before[0])
        if follows:
            found[-1][0] += 1
        else:
            found.append([1, *shape])
        before = (spots, time, level)
    return [tuple(shape) for shape in found]


def _goes_back(places: torch.Tensor) -> torch.Tensor:
    """Whether each place (h, w) stands before or on the one in front of it."""
    rows, columns = (places[1:, axis] - places[:-1, axis] for axis in (0, 1))
    return (rows < 0) | ((rows == 0) & (columns <= 0))


def _runs(kinds: torch.Tensor) -> list[tuple[int, int]]:
    edges = [0, *((kinds[1:] != kinds[:-1]).nonzero().flatten() + 1).tolist(), len(kinds)]
    return list(itertools.pairwise(edges))


def _separable(channels: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether each channel changes along one axis only, and every axis longer than one place has a channel."""
    spread = channels.unflatten(0, shape)
    moves = [(spread != spread.narrow(axis, 0, 1)).flatten(0, 2).any(dim=0) for axis in range(3)]
    alone = torch.stack(moves).sum(dim=0) == 1
    return bool(alone.all()) and all(bool(move.any()) == (n > 1) for move, n in zip(moves, shape))
