"""Triton forward of neighborhood attention on boxes that follow the query tile (jitted code only; host: halo.py).

One program serves one query tile of one head. Its keys are one box of the grid, wherever it lies: lane j of a step is
unravelled into a place of the box, the place gives the token, and the row is loaded from where it stands. No permutation, no
padding, no mask tensor: where the queries of a tile differ, their windows are compared with the keys' places in registers.
After FNA (Hassani et al., arXiv 2403.04690). Dense rows (text) are tiles too, whose keys are a list instead of a box.
"""

import triton
import triton.language as tl
from genattn.kernels.triton.forward_kernel import GUARDS, LN2, LOG2E, SIZES, accumulate, load_rows, store_rows, view_at

NOWHERE = tl.constexpr(511 << 22)
HALO_SIZES = ["seqlen", "parts_t", "parts_y", "parts_x", "shared", "visible", "dense", "dense_tiles"]


@triton.jit
def box_places(lanes, height, width):
    """(frame, y, x) of each lane in a box whose planes are height x width."""
    line = lanes // width
    return line // height, line % height, lanes % width


@triton.jit
def box_tokens(PLACES, lanes, used, first_t, first_y, first_x, height, width, extent_y, extent_x,
               DIL_T: tl.constexpr, DIL_Y: tl.constexpr, DIL_X: tl.constexpr, MOVED: tl.constexpr):  # fmt: skip
    """Token of each lane of a box, and its place in the box as one word; unused lanes are token 0 at no place."""
    t, y, x = box_places(lanes, height, width)
    token = ((first_t + t * DIL_T) * extent_y + first_y + y * DIL_Y) * extent_x + first_x + x * DIL_X
    token = tl.where(used, token, 0)
    if MOVED:
        token = tl.load(PLACES + token, mask=used, other=0)
    return token, tl.where(used, (t << 22) + (y << 11) + x, NOWHERE)


@triton.jit
def window_words(WINDOWS, lanes, used, height, width, at_t, at_y, at_x):
    """First and last visible place of each query as words with fields of 9, 10 and 10 bits, guard bits set in the last."""
    t, y, x = box_places(lanes, height, width)
    lower = tl.load(WINDOWS + (at_t + t) * 2, mask=used, other=0) << 22
    lower += tl.load(WINDOWS + (at_y + y) * 2, mask=used, other=0) << 11
    lower += tl.load(WINDOWS + (at_x + x) * 2, mask=used, other=0)
    upper = tl.load(WINDOWS + (at_t + t) * 2 + 1, mask=used, other=0) << 22
    upper += tl.load(WINDOWS + (at_y + y) * 2 + 1, mask=used, other=0) << 11
    upper += tl.load(WINDOWS + (at_x + x) * 2 + 1, mask=used, other=0)
    return lower, upper | GUARDS


@triton.jit
def fold(query, K, V, token_k, used_k, k_s, v_s, channels, factor, lower, upper, words, acc, top, total,
         DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """One step of keys into the running softmax: those inside each query's window, or all that are in use."""
    key = load_rows(K, token_k, used_k, k_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if WINDOWED:
        # an unused lane is at no place, so the windows hide it too
        keys = words[None, :]
        inside = (((keys | GUARDS) - lower[:, None]) & (upper[:, None] - keys) & GUARDS) == GUARDS
        scores = tl.where(inside, scores, float("-inf"))
    else:
        scores += tl.where(used_k, 0.0, float("-inf"))[None, :]
    value = load_rows(V, token_k, used_k, v_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN)
    return accumulate(scores, factor, value, acc, top, total, True, PRECISION)


@triton.jit(do_not_specialize=[*SIZES, *HALO_SIZES])
def halo_kernel(
    Q, K, V, OUT, LSE, PARTS, WINDOWS, PLACES, LISTED, KEY_MASK, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    seqlen, heads, group, parts_t, parts_y, parts_x, extent_y, extent_x, shared, visible, dense, dense_tiles,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIL_T: tl.constexpr, DIL_Y: tl.constexpr, DIL_X: tl.constexpr,
    MOVED: tl.constexpr, HAS_LISTED: tl.constexpr, HAS_PLAIN: tl.constexpr, HAS_RAGGED: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LISTED: the shared keys, the keys that dense queries see, the dense queries. PARTS: 6 numbers per part of an axis, frames
    then rows then columns: first query, queries, first key, keys, where its windows stand, whether all is seen."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, DIM_PAD)
    # dense rows first: they have the most keys
    tile = tl.maximum(tl.program_id(0) - dense_tiles, 0)
    AT_T = PARTS + tile // (parts_y * parts_x) * 6
    AT_Y = PARTS + (parts_t + tile // parts_x % parts_y) * 6
    AT_X = PARTS + (parts_t + parts_y + tile % parts_x) * 6
    rows_y, rows_x = tl.load(AT_Y + 1), tl.load(AT_X + 1)
    used_q = rows < tl.where(tl.program_id(0) < dense_tiles, 0, tl.load(AT_T + 1) * rows_y * rows_x)
    token_q, _ = box_tokens(PLACES, rows, used_q, tl.load(AT_T), tl.load(AT_Y), tl.load(AT_X), rows_y, rows_x,
                            extent_y, extent_x, DIL_T, DIL_Y, DIL_X, MOVED)  # fmt: skip
    lower, upper = window_words(WINDOWS, rows, used_q, rows_y, rows_x, tl.load(AT_T + 4), tl.load(AT_Y + 4), tl.load(AT_X + 4))
    first_t, first_y, first_x = tl.load(AT_T + 2), tl.load(AT_Y + 2), tl.load(AT_X + 2)
    height, width = tl.load(AT_Y + 3), tl.load(AT_X + 3)
    box = tl.load(AT_T + 3) * height * width
    plain = tl.load(AT_T + 5) * tl.load(AT_Y + 5) * tl.load(AT_X + 5)
    listed = 0
    if HAS_LISTED:
        is_dense = tl.program_id(0) < dense_tiles
        at = tl.program_id(0) * BLOCK_Q + rows
        here = at < tl.where(is_dense, dense, 0)
        used_q = here | used_q
        token_q = tl.where(here, tl.load(LISTED + shared + visible + at, mask=here, other=0), token_q)
        LISTED += tl.where(is_dense, shared, 0)
        listed = tl.where(is_dense, visible, shared)
        box = tl.where(is_dense, 0, box)
    kv_head = head // group
    query = load_rows(
        Q + view_at(batch, head, q_b, q_h, ALIGN), token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    K += view_at(batch, kv_head, k_b, k_h, ALIGN)
    V += view_at(batch, kv_head, v_b, v_h, ALIGN)
    if MASKED:
        KEY_MASK += batch * seqlen
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)
    factor = scale * LOG2E
    if HAS_LISTED:
        for step in tl.range(0, tl.cdiv(listed, BLOCK_K)):
            place = step * BLOCK_K + lanes
            used_k = place < listed
            token_k = tl.load(LISTED + place, mask=used_k, other=0)
            if MASKED:
                used_k = used_k & (tl.load(KEY_MASK + token_k, mask=used_k, other=0) != 0)
            acc, top, total = fold(query, K, V, token_k, used_k, k_s, v_s, channels, factor, lower, upper, place, acc, top,
                                   total, DIM, DIM_PAD, False, WIDE, ALIGN, PRECISION)  # fmt: skip
    for windowed in tl.static_range(2):
        if HAS_RAGGED if windowed else HAS_PLAIN:
            last = tl.cdiv(box, BLOCK_K) * ((1 - plain) if windowed else plain)
            for step in tl.range(0, last):
                place = step * BLOCK_K + lanes
                used_k = place < box
                token_k, words = box_tokens(PLACES, place, used_k, first_t, first_y, first_x, height, width, extent_y,
                                            extent_x, DIL_T, DIL_Y, DIL_X, MOVED)  # fmt: skip
                if MASKED:
                    used_k = used_k & (tl.load(KEY_MASK + token_k, mask=used_k, other=0) != 0)
                    words = tl.where(used_k, words, NOWHERE)
                acc, top, total = fold(query, K, V, token_k, used_k, k_s, v_s, channels, factor, lower, upper, words, acc,
                                       top, total, DIM, DIM_PAD, windowed == 1, WIDE, ALIGN, PRECISION)  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    store_rows(OUT + view_at(batch, head, o_b, o_h, ALIGN), acc, token_q, used_q, o_s, channels, DIM, WIDE, ALIGN)
    tl.store(LSE + (batch * seqlen + token_q) * heads + head, lse, mask=used_q)
