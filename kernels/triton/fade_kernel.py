"""A fade in the Triton kernels: what becomes of the scores of a tile pair (jitted code only; see kernels/plan/fade.py).

A window, a span and their comparison are a few scalars a turn. The factor is one on the scale, the penalty one on the running
maximum or the log-sum-exp, so no element costs more; only pseudo-keys of several tiles in one block have a factor each.
"""

import triton
import triton.language as tl


@triton.jit
def ends_of(TABLE, tile):
    """The two ends of a tile's window or span."""
    return tl.load(TABLE + tile * 2), tl.load(TABLE + tile * 2 + 1)


@triton.jit
def ends_of_pseudo(SPAN, at, inside, PARTS: tl.constexpr):
    """The ends of the spans of the tiles that some pseudo-keys belong to."""
    tile = at // PARTS
    first = tl.load(SPAN + tile * 2, mask=inside, other=0)
    return first, tl.load(SPAN + tile * 2 + 1, mask=inside, other=0)


@triton.jit
def lowering(low, high, first, last, fade_factor, fade_off):
    """(factor, what is taken off in base 2) for windows low..high and spans first..last: 1 and 0 where they meet."""
    outside = (last < low) | (first > high)
    return tl.where(outside, fade_factor, 1.0), tl.where(outside, fade_off, 0.0)
