"""What a window shows between two ranges of one axis: nothing, something or everything.

Windows that move forward without gaps need only their ends: the union over queries q0..q1 is [low(q0), high(q1)) and the
intersection is [low(q1), high(q0)). Wrapped, dilated or irregular windows are counted query by query instead.
"""

import numpy as np

from genattn.kernels.plan.element_rule import GridRule


def box_codes(rule: GridRule, head: int, cls: int, boxes_q: np.ndarray, boxes_k: np.ndarray) -> np.ndarray:
    """Uint8 [NQ, NK]: codes between boxes (y0, y1, x0, x1) under one class. 0 nothing, 1 something, 2 everything."""
    codes = np.full((len(boxes_q), len(boxes_k)), 2, dtype=np.uint8)
    for axis in (0, 1):
        length = rule.extent[axis]
        low = rule.low[head, cls, axis, :length].numpy().astype(np.int64)
        width = rule.width[head, cls, axis, :length].numpy().astype(np.int64)
        pair = boxes_q[:, 2 * axis : 2 * axis + 2], boxes_k[:, 2 * axis : 2 * axis + 2]
        kinds_q, which_q = np.unique(pair[0], axis=0, return_inverse=True)
        kinds_k, which_k = np.unique(pair[1], axis=0, return_inverse=True)
        table = range_codes(low, width, kinds_q, kinds_k, rule.dilation[axis], rule.circular[axis])
        np.minimum(codes, table[which_q.reshape(-1)][:, which_k.reshape(-1)], out=codes)
    return codes


def range_codes(
    low: np.ndarray, width: np.ndarray, ranges_q: np.ndarray, ranges_k: np.ndarray, dilation: int = 1, circular: bool = False
) -> np.ndarray:
    """Uint8 [NQ, NK]: codes between ranges [start, stop) of one axis of len(low) coordinates."""
    high = low + width
    if dilation == 1 and not circular and _moves_forward(low, high):
        q0, q1 = ranges_q[:, :1], ranges_q[:, 1:] - 1
        some = (low[q0] < ranges_k[:, 1]) & (high[q1] > ranges_k[:, 0])
        every = (low[q1] <= ranges_k[:, 0]) & (high[q0] >= ranges_k[:, 1])
        return some.astype(np.uint8) + every
    seen = _counts(low, width, ranges_k, dilation, circular)
    hit = np.cumsum(np.pad(seen > 0, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
    whole = np.cumsum(np.pad(seen == np.diff(ranges_k, axis=1).T, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
    start, stop = ranges_q.T
    some = hit[stop] > hit[start]
    every = whole[stop] - whole[start] == np.diff(ranges_q, axis=1)
    return some.astype(np.uint8) + every


def _moves_forward(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether unions and intersections of neighbouring windows are given by their ends."""
    return bool(
        (high > low).all() and (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all() and (low[1:] <= high[:-1]).all()
    )


def _counts(low: np.ndarray, width: np.ndarray, ranges_k: np.ndarray, dilation: int, circular: bool) -> np.ndarray:
    """Int64 [L, NK]: keys of each range that each query sees."""
    length = len(low)
    query = np.arange(length)[:, None]
    start, stop = ranges_k.T
    counts = np.zeros((length, len(ranges_k)), dtype=np.int64)
    begin = (low % length if circular else low)[:, None]
    end = begin + (np.minimum(width, length) if circular else width)[:, None]
    for lap in (0, length) if circular else (0,):
        first, last = np.maximum(begin, start + lap), np.minimum(end, stop + lap)
        if dilation == 1:
            found = last - first
        else:
            same = query + lap  # keys k = q (mod dilation), counted on their own lap
            found = (last - 1 - same) // dilation - (first - 1 - same) // dilation
        counts += np.where(last > first, found, 0)
    return counts
