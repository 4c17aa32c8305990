"""Triton forward of block-sparse attention (jitted code only; the host is block_sparse.py).

One program serves one query tile of one head: first the full key tiles with no mask, then the partial ones, in which the
element rule is evaluated from coordinates and small tables in registers. Rows are gathered by token index, so a tile may be
any set of tokens; tiles that are runs of the sequence skip the index load. Flash-style online softmax in base 2 (Dao et al.,
arXiv 2205.14135, Alg. 1), log-sum-exp out in base e.
"""

import triton
import triton.language as tl
from genattn.kernels.triton.fade_kernel import ends_of, ends_of_pseudo, lowering

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELD = tl.constexpr(1023)
GUARDS = tl.constexpr((1 << 31 | 1 << 21 | 1 << 10) - (1 << 32))
# numbers of which the compiler need not know whether they are 1 or divide by 16: no address gains, and each change would
# compile a kernel anew
STRIDES = [f"{tensor}_{axis}" for tensor in "qkvodgt" for axis in "bsh"]
SIZES = [
    *STRIDES, "tiles_b", "counts_b", "seqlen_q", "seqlen_k", "heads", "group", "tiles_q", "tiles_k", "nnz", "pairs",
    "pseudo", "tail_words", "frames", "classes", "longest", "extent_y", "extent_x",
]  # fmt: skip


@triton.jit
def lane_tokens(TILES, tile, lanes, seqlen, BLOCK: tl.constexpr, RUNS: tl.constexpr):
    """Token of each lane of a tile; -1 - t where the lane is not in use, t a token whose row may be read instead."""
    if RUNS:
        token = tile * BLOCK + lanes
        return tl.where(token < seqlen, token, -seqlen)
    else:
        return tl.load(TILES + tile * BLOCK + lanes)


@triton.jit
def listed_tile(COLUMNS, turn, end, STEPS: tl.constexpr):
    """Tile that a turn works on, when each is taken in STEPS steps; tile 0 from `end` on, where nothing reads it."""
    return tl.load(COLUMNS + turn // STEPS, mask=turn < end, other=0)


@triton.jit
def step_lanes(turn, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Lanes of a tile that a turn works on, when the tile is taken in STEPS steps."""
    return (turn % STEPS) * (BLOCK // STEPS) + tl.arange(0, BLOCK // STEPS)


@triton.jit
def turn_tokens(TILES, tile, turn, seqlen, BLOCK: tl.constexpr, STEPS: tl.constexpr, RUNS: tl.constexpr):
    """Tokens of the lanes that a turn works on."""
    return lane_tokens(TILES, tile, step_lanes(turn, BLOCK, STEPS), seqlen, BLOCK, RUNS)


@triton.jit
def hide_unused(scores, KEY_COUNTS, KEY_TILES, key_tile, lanes, HOLES: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Scores [BQ, BK] with -inf for the lanes of a key tile that are not in use. HOLES 1: they stand behind its `KEY_COUNTS`
    used ones, of which no tile has fewer than LEAST, so that most columns cost nothing. HOLES 2: they stand anywhere."""
    if HOLES == 1:
        count = tl.load(KEY_COUNTS + key_tile)
        unused = (lanes >= LEAST) & (lanes >= count)
        return tl.where(unused[None, :], float("-inf"), scores)
    elif HOLES == 2:
        token = tl.load(KEY_TILES + key_tile * BLOCK + lanes)
        return tl.where((token >= 0)[None, :], scores, float("-inf"))
    else:
        return scores


@triton.jit
def tail_bias(TAIL_BIAS, SKIPPED, at, inside, PARTS: tl.constexpr):
    """What is added to the scores of some pseudo-keys for one query tile: their weight, or -inf where it visits their tile.
    SKIPPED: the words of the query tile, a bit per key tile; PARTS pseudo-keys to a tile."""
    word = tl.load(SKIPPED + at // PARTS // 32, mask=inside, other=0)
    stands = ((word >> (at // PARTS % 32)) & 1) != 0
    return tl.where(stands, tl.load(TAIL_BIAS + at, mask=inside, other=float("-inf")), float("-inf"))


@triton.jit
def view_at(batch, head, b_stride, h_stride, ALIGN: tl.constexpr):
    """Offset of a head's [S, D] view. 64 bits: the last head of a long video begins beyond 2^31 elements. ALIGN is a power of
    two that divides every stride; written out, because the compiler then loads 16 bytes at once for any head dim."""
    return batch.to(tl.int64) * (b_stride // ALIGN) * ALIGN + head.to(tl.int64) * (h_stride // ALIGN) * ALIGN


@triton.jit
def load_rows(base, token, used, stride, channels, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ALL: tl.constexpr,
              WIDE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """[lanes, DIM_PAD] rows of a [S, D] view by token; unused lanes and channels are zero."""
    if WIDE:
        token = token.to(tl.int64)
    at = base + (token * (stride // ALIGN) * ALIGN)[:, None] + channels[None, :]
    if ALL and DIM == DIM_PAD:
        return tl.load(at)
    elif ALL:
        return tl.load(at, mask=(channels < DIM)[None, :], other=0.0)
    elif DIM == DIM_PAD:
        return tl.load(at, mask=used[:, None], other=0.0)
    else:
        return tl.load(at, mask=used[:, None] & (channels < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, token, used, stride, channels, DIM: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Write [lanes, DIM_PAD] rows of a [S, D] view by token, in the type of the view."""
    if WIDE:
        token = token.to(tl.int64)
    at = base + (token * (stride // ALIGN) * ALIGN)[:, None] + channels[None, :]
    tl.store(at, rows.to(base.dtype.element_ty), mask=used[:, None] & (channels < DIM)[None, :])


@triton.jit
def axis_bounds(low, width, extent, lap, CIRCULAR: tl.constexpr):
    """First and last key coordinate of a window, clamped to a field; (1023, 0) when it is empty. `lap` > 0 is the part of a
    wrapping window that comes around the far end."""
    if CIRCULAR:
        low = ((low % extent) + extent) % extent - lap * extent
    high = tl.minimum(low + width - 1, FIELD)
    low = tl.maximum(low, 0)
    return tl.where(low <= high, low, FIELD), tl.where(low <= high, high, 0)


@triton.jit
def across(queries, keys, TURNED: tl.constexpr):
    """A vector over queries and one over keys as they broadcast to [BQ, BK], or [BK, BQ] when turned."""
    if TURNED:
        return queries[None, :], keys[:, None]
    else:
        return queries[:, None], keys[None, :]


@triton.jit
def hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES, LOW, WIDTH, frames, longest, extent_y, extent_x,
                 DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
                 TURNED: tl.constexpr):  # fmt: skip
    """GridRule on the scores of a tile pair, [BQ, BK] or turned: one pass per frame that the key tile holds.

    A token is one word, frame + 2 | y | x in fields of 9, 10 and 10 bits with a guard bit above each. Subtracting the lower
    bounds from the key, and the key from the upper bounds, leaves all guard bits standing just when every field is inside:
    four operations an element for three comparisons, and one register a key instead of three. The scores themselves are
    carried through the passes, not a mask beside them, for the same reason.
    """
    tq, yq, xq = (words_q >> 22) - 2, (words_q >> 11) & FIELD, words_q & FIELD
    shown = tl.where((words_k >> 22) == 0, float("-inf"), 0.0)
    scores += across(tq * 0.0, shown, TURNED)[1]
    first = tl.load(FRAME_SPAN + key_tile * 2)
    last = tl.load(FRAME_SPAN + key_tile * 2 + 1)
    for frame in tl.range(first, last, num_stages=1):
        kind = tl.load(CLASSES + tq * frames + frame, mask=tq >= 0, other=-1)
        row = tl.maximum(kind, 0) * 2 * longest
        low_y, width_y = tl.load(LOW + row + yq), tl.where(kind >= 0, tl.load(WIDTH + row + yq), 0)
        low_x, width_x = tl.load(LOW + row + longest + xq), tl.load(WIDTH + row + longest + xq)
        # a query outside the grid sees every frame
        low_y, width_y = tl.where(tq < 0, 0, low_y), tl.where(tq < 0, FIELD + 1, width_y)
        low_x, width_x = tl.where(tq < 0, 0, low_x), tl.where(tq < 0, FIELD + 1, width_x)
        fits = across(tq > FIELD, (words_k >> 22) != frame + 2, TURNED)[1]
        for lap in tl.static_range((2 if CIRC_Y else 1) * (2 if CIRC_X else 1)):
            from_y, to_y = axis_bounds(low_y, width_y, extent_y, lap % 2 if CIRC_Y else 0, CIRC_Y)
            from_x, to_x = axis_bounds(low_x, width_x, extent_x, lap // (2 if CIRC_Y else 1), CIRC_X)
            lower, keys = across(((frame + 2) << 22) + (from_y << 11) + from_x, words_k, TURNED)
            upper, _ = across((((frame + 2) << 22) + (to_y << 11) + to_x) | GUARDS, words_k, TURNED)
            inside = (((keys | GUARDS) - lower) & (upper - keys) & GUARDS) == GUARDS
            if DIL_Y > 1:
                rest_q, rest_k = across(tl.where(tq < 0, -1, yq % DIL_Y), ((words_k >> 11) & FIELD) % DIL_Y, TURNED)
                inside = inside & ((rest_q == rest_k) | (rest_q < 0))
            if DIL_X > 1:
                rest_q, rest_k = across(tl.where(tq < 0, -1, xq % DIL_X), (words_k & FIELD) % DIL_X, TURNED)
                inside = inside & ((rest_q == rest_k) | (rest_q < 0))
            fits = fits | inside
        scores = tl.where(fits, scores, float("-inf"))
    return scores


@triton.jit
def bits_visible(BITS, slot, rows, lanes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Packed visibility of a tile pair, bool [BQ, BK]; words of 16 bits."""
    words: tl.constexpr = (BLOCK_K + 15) // 16
    at = BITS + (slot.to(tl.int64) * BLOCK_Q + rows)[:, None] * words + (lanes // 16)[None, :]
    return ((tl.load(at).to(tl.int32) >> (lanes % 16)[None, :]) & 1) != 0


@triton.jit
def accumulate(scores, factor, value, acc, top, total, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax: fold scores and their values in. `factor` > 0 turns scores into base 2, in one operation with the
    subtraction of the running maximum `top`, which is in base 2 already."""
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    offset = tl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    shrink = tl.exp2(top - offset)
    weights = tl.exp2(scores * factor - offset[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def serve_tile(
    rank, pair,
    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, KEY_COUNTS, ROW_PTR, COLUMNS, NUM_FULL, ORDER,
    WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS,
    TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED, WINDOW, SPAN, QUERY_SCALES, KEY_SCALES, scale, fade_factor, fade_off,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, t_b, t_s, t_h, tiles_b, counts_b,
    seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x, pseudo, tail_words,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, LEAST: tl.constexpr, GUARDED: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    TAIL: tl.constexpr, FADE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: the tile of this rank by length, pair = batch * heads + head. LISTS, RULE_HEADS, SLOT_ROWS:
    1 or the number of heads. RULE: 0 none, 1 grid, 2 packed bits. A full key tile is taken in SPLIT steps, a partial one in
    FINE steps (its mask needs registers too). GUARDED: a key tile may hide all its keys, and rows it hides are not to be read.
    TAIL: pseudo-keys per key tile that is not listed, 0 for none. FADE: scores of tile pairs outside are lowered.

    The tokens of this turn and the tile of the next are carried through the loop, so that rows, tokens and tile numbers are
    each one load away from what is known, and the compiler prefetches rows as many turns ahead as there are stages."""
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    listed = head if LISTS > 1 else 0
    # longest lists first, so that the last wave is short
    tile = tl.load(ORDER + listed * tiles_q + rank)
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, DIM_PAD)
    token_q = lane_tokens(QUERY_TILES, tile, rows, seqlen_q, BLOCK_Q, RUNS_Q)
    used_q = token_q >= 0
    token_q = token_q ^ (token_q >> 31)
    kv_head = head // group
    query = load_rows(
        Q + view_at(batch, head, q_b, q_h, ALIGN), token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    K += view_at(batch, kv_head, k_b, k_h, ALIGN)
    V += view_at(batch, kv_head, v_b, v_h, ALIGN)
    KEY_TILES += batch * tiles_b
    WORDS_K += batch * tiles_b
    KEY_COUNTS += batch * counts_b
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)
    factor = scale * LOG2E
    if INT8:
        factor *= tl.load(QUERY_SCALES + (batch * heads + head) * tiles_q + tile)
        KEY_SCALES += (batch * (heads // group) + kv_head) * tiles_k
    if RULE == 1:
        ruled = head if RULE_HEADS > 1 else 0
        CLASSES += ruled * frames * frames
        LOW += ruled * classes * 2 * longest
        WIDTH += ruled * classes * 2 * longest
        words_q = tl.load(WORDS_Q + tile * BLOCK_Q + rows)
    if FADE:
        low, high = ends_of(WINDOW, tile)
    first = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile)
    last = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile + 1)
    ragged = first + tl.load(NUM_FULL + listed * tiles_q + tile)
    for part in tl.static_range(2 if RULE > 0 else 1):
        begin = first * SPLIT if part == 0 else ragged * FINE
        end = ragged * SPLIT if part == 0 else last * FINE
        key_tile = listed_tile(COLUMNS, begin, end, SPLIT if part == 0 else FINE)
        token_k = turn_tokens(KEY_TILES, key_tile, begin, seqlen_k, BLOCK_K, SPLIT if part == 0 else FINE, RUNS_K)
        next_tile = listed_tile(COLUMNS, begin + 1, end, SPLIT if part == 0 else FINE)
        for turn in tl.range(begin, end):
            lanes = step_lanes(turn, BLOCK_K, SPLIT if part == 0 else FINE)
            row_k = token_k ^ (token_k >> 31)
            key = load_rows(K, row_k, token_k >= 0, k_s, channels, DIM, DIM_PAD, not GUARDED, WIDE, ALIGN)
            value = load_rows(V, row_k, token_k >= 0, v_s, channels, DIM, DIM_PAD, not GUARDED, WIDE, ALIGN)
            unit = factor
            if INT8:
                scores = tl.dot(query, tl.trans(key)).to(tl.float32)
                unit *= tl.load(KEY_SCALES + key_tile)
            else:
                scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            if part == 1:
                if RULE == 1:
                    words_k = tl.load(WORDS_K + key_tile * BLOCK_K + lanes)
                    scores = hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES, LOW, WIDTH, frames, longest,
                                          extent_y, extent_x, DIL_Y, DIL_X, CIRC_Y, CIRC_X, False)  # fmt: skip
                else:
                    slot = tl.load(SLOTS + (head if SLOT_ROWS > 1 else 0) * nnz + turn // (SPLIT if part == 0 else FINE))
                    seen = bits_visible(BITS, slot, rows, lanes, BLOCK_Q, BLOCK_K)
                    scores = tl.where(seen, scores, float("-inf"))
            if part == 0 or RULE == 2:
                scores = hide_unused(scores, KEY_COUNTS, KEY_TILES, key_tile, lanes, HOLES, LEAST, BLOCK_K)
            if FADE:
                from_place, to_place = ends_of(SPAN, key_tile)
                weight, off = lowering(low, high, from_place, to_place, fade_factor, fade_off)
                # a maximum that is higher by so much takes it off every score
                acc, top, total = accumulate(
                    scores, unit * weight, value, acc, top + off, total, part == 1 or GUARDED, PRECISION
                )
                top -= off
            else:
                acc, top, total = accumulate(scores, unit, value, acc, top, total, part == 1 or GUARDED, PRECISION)
            token_k = turn_tokens(KEY_TILES, next_tile, turn + 1, seqlen_k, BLOCK_K, SPLIT if part == 0 else FINE, RUNS_K)
            # loaded again: a value handed on through two turns would keep the compiler from prefetching
            key_tile = listed_tile(COLUMNS, turn + 1, end, SPLIT if part == 0 else FINE)
            next_tile = listed_tile(COLUMNS, turn + 2, end, SPLIT if part == 0 else FINE)
    if TAIL > 0:
        # pseudo-keys of the key tiles that are not listed; the same for all queries of the tile
        TAIL_K += view_at(batch, kv_head, t_b, t_h, ALIGN)
        TAIL_V += view_at(batch, kv_head, t_b, t_h, ALIGN)
        SKIPPED += (listed * tiles_q + tile) * tail_words
        for turn in tl.range(0, tl.cdiv(pseudo, BLOCK_K // SPLIT)):
            at = turn * (BLOCK_K // SPLIT) + tl.arange(0, BLOCK_K // SPLIT)
            inside = at < pseudo
            key = load_rows(TAIL_K, at, inside, t_s, channels, DIM, DIM_PAD, False, False, ALIGN)
            value = load_rows(TAIL_V, at, inside, t_s, channels, DIM, DIM_PAD, False, False, ALIGN)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            if FADE:
                from_place, to_place = ends_of_pseudo(SPAN, at, inside, TAIL)
                weight, off = lowering(low, high, from_place, to_place, fade_factor, fade_off)
                scores = scores * weight[None, :] - (off / factor)[None, :]
            scores += tail_bias(TAIL_BIAS + (batch * (heads // group) + kv_head) * pseudo, SKIPPED, at, inside, TAIL)[None, :]
            acc, top, total = accumulate(scores, factor, value, acc, top, total, True, PRECISION)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    store_rows(OUT + view_at(batch, head, o_b, o_h, ALIGN), acc, token_q, used_q, o_s, channels, DIM, WIDE, ALIGN)
    tl.store(LSE + (batch * seqlen_q + token_q) * heads + head, lse, mask=used_q)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, KEY_COUNTS, ROW_PTR, COLUMNS, NUM_FULL, ORDER,
    WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS,
    TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED, WINDOW, SPAN, QUERY_SCALES, KEY_SCALES, scale, fade_factor, fade_off,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, t_b, t_s, t_h, tiles_b, counts_b,
    seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x, pseudo, tail_words,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, LEAST: tl.constexpr, GUARDED: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    TAIL: tl.constexpr, FADE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
    pairs, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """A program serves one tile, or when PERSISTENT every `num_programs`-th one, longest first and back and
    forth, so that no program gets the longer of each wave: balanced without atomics. pairs: batch * heads."""
    if PERSISTENT:
        programs = tl.num_programs(0)
        for wave in tl.range(0, tl.cdiv(tiles_q * pairs, programs)):
            slot = tl.program_id(0)
            work = wave * programs + tl.where(wave % 2 == 0, slot, programs - 1 - slot)
            if work < tiles_q * pairs:
                serve_tile(
                    work % tiles_q, work // tiles_q,
                    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, KEY_COUNTS, ROW_PTR, COLUMNS, NUM_FULL, ORDER,
                    WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS,
                    TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED, WINDOW, SPAN, QUERY_SCALES, KEY_SCALES, scale, fade_factor, fade_off,
                    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, t_b, t_s, t_h, tiles_b, counts_b,
                    seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
                    pseudo, tail_words, DIM, DIM_PAD, BLOCK_Q, BLOCK_K, SPLIT, FINE, LISTS, RULE, RULE_HEADS, SLOT_ROWS,
                    RUNS_Q, RUNS_K, HOLES, LEAST, GUARDED, WIDE, ALIGN, DIL_Y, DIL_X, CIRC_Y, CIRC_X, TAIL, FADE, INT8,
                    PRECISION
                )  # fmt: skip
    else:
        serve_tile(
            tl.program_id(0), tl.program_id(1),
            Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, KEY_COUNTS, ROW_PTR, COLUMNS, NUM_FULL, ORDER,
            WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS,
            TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED, WINDOW, SPAN, QUERY_SCALES, KEY_SCALES, scale, fade_factor, fade_off,
            q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, t_b, t_s, t_h, tiles_b, counts_b,
            seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
            pseudo, tail_words, DIM, DIM_PAD, BLOCK_Q, BLOCK_K, SPLIT, FINE, LISTS, RULE, RULE_HEADS, SLOT_ROWS,
            RUNS_Q, RUNS_K, HOLES, LEAST, GUARDED, WIDE, ALIGN, DIL_Y, DIL_X, CIRC_Y, CIRC_X, TAIL, FADE, INT8,
            PRECISION
        )  # fmt: skip
