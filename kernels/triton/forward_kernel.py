"""Triton forward of block-sparse attention (jitted code only; the host is block_sparse.py).

One program serves one query tile of one head: first the full key tiles with no mask, then the partial ones, in which the
element rule is evaluated from coordinates and small tables in registers. Rows are gathered by token index, so a tile may be
any set of tokens; tiles that are runs of the sequence skip the index load. Flash-style online softmax in base 2 (Dao et al.,
arXiv 2205.14135, Alg. 1), log-sum-exp out in base e.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELD = tl.constexpr(1023)
GUARDS = tl.constexpr((1 << 31 | 1 << 21 | 1 << 10) - (1 << 32))


@triton.jit
def tile_tokens(TILES, tile, lanes, seqlen, BLOCK: tl.constexpr, RUNS: tl.constexpr):
    """Token of each lane, and whether the lane is in use."""
    if RUNS:
        token = tile * BLOCK + lanes
        return token, token < seqlen
    else:
        token = tl.load(TILES + tile * BLOCK + lanes)
        return tl.maximum(token, 0), token >= 0


@triton.jit
def step_lanes(turn, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Lanes of a tile that a turn works on, when the tile is taken in STEPS steps."""
    return (turn % STEPS) * (BLOCK // STEPS) + tl.arange(0, BLOCK // STEPS)


@triton.jit
def load_rows(base, token, used, stride, channels, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ALL: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """[lanes, DIM_PAD] rows of a [S, D] view by token; unused lanes and channels are zero."""
    if WIDE:
        token = token.to(tl.int64)
    at = base + token[:, None] * stride + channels[None, :]
    if ALL and DIM == DIM_PAD:
        return tl.load(at)
    elif DIM == DIM_PAD:
        return tl.load(at, mask=used[:, None], other=0.0)
    else:
        return tl.load(at, mask=used[:, None] & (channels < DIM)[None, :], other=0.0)


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
def scores_of(query, key, factor, KEY_SCALES, key_tile, INT8: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [BQ, BK] in base 2; integers count in units of `factor` times the scale of their key tile."""
    if INT8:
        return tl.dot(query, tl.trans(key)).to(tl.float32) * (factor * tl.load(KEY_SCALES + key_tile))
    else:
        return tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor


@triton.jit
def accumulate(scores, value, acc, top, total, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax: fold scores (base 2) and their values in."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    offset = tl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    shrink = tl.exp2(top - offset)
    weights = tl.exp2(scores - offset[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def add_frame_sums(FRAME_LSE, row_at, used_q, scores, tk, FRAME_SPAN, key_tile):
    """Fold scores (base 2) into the running log-sum-exp of each key frame (base e); this program owns the rows."""
    first = tl.load(FRAME_SPAN + key_tile * 2)
    last = tl.load(FRAME_SPAN + key_tile * 2 + 1)
    for frame in tl.range(first, last, num_stages=1):
        here = tl.where((tk == frame)[None, :], scores, float("-inf"))
        at = FRAME_LSE + row_at + frame
        old = tl.load(at, mask=used_q, other=float("-inf")) * LOG2E
        top = tl.maximum(old, tl.max(here, 1))
        offset = tl.where(top == float("-inf"), 0.0, top)
        total = tl.exp2(old - offset) + tl.sum(tl.exp2(here - offset[:, None]), 1)
        new = tl.where(total > 0, (offset + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
        tl.store(at, new, mask=used_q)
        # the next tile of this frame reads what was just written, perhaps by another thread
        tl.debug_barrier()


@triton.jit
def serve_tile(
    rank, pair,
    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, KEY_MASK,
    COORDS, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, MIX, FRAME_LSE, QUERY_SCALES, KEY_SCALES, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_FRAMES: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: the tile of this rank by length, pair = batch * heads + head. LISTS, RULE_HEADS, SLOT_ROWS:
    1 or the number of heads. RULE: 0 none, 1 grid, 2 packed bits. A full key tile is taken in SPLIT steps, a partial one in
    FINE steps (its mask needs registers too)."""
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    listed = head if LISTS > 1 else 0
    # longest lists first, so that the last wave is short
    tile = tl.load(ORDER + listed * tiles_q + rank)
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, DIM_PAD)
    token_q, used_q = tile_tokens(QUERY_TILES, tile, rows, seqlen_q, BLOCK_Q, RUNS_Q)
    kv_head = head // group
    query = load_rows(Q + batch * q_b + head * q_h, token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE)
    K += batch * k_b + kv_head * k_h
    V += batch * v_b + kv_head * v_h
    if MASKED:
        KEY_MASK += batch * seqlen_k
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)
    factor = scale * LOG2E
    if INT8:
        factor *= tl.load(QUERY_SCALES + (batch * heads + head) * tiles_q + tile)
        KEY_SCALES += (batch * (heads // group) + kv_head) * tiles_k
    if HAS_FRAMES:
        row_at = ((batch * seqlen_q + token_q) * heads + head) * frames
    first = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile)
    last = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile + 1)
    ragged = first + tl.load(NUM_FULL + listed * tiles_q + tile)
    for turn in tl.range(first * SPLIT, ragged * SPLIT):
        key_tile = tl.load(COLUMNS + turn // SPLIT)
        lanes = step_lanes(turn, BLOCK_K, SPLIT)
        token_k, used_k = tile_tokens(KEY_TILES, key_tile, lanes, seqlen_k, BLOCK_K, RUNS_K)
        if MASKED:
            used_k = used_k & (tl.load(KEY_MASK + token_k, mask=used_k, other=0) != 0)
        key = load_rows(K, token_k, used_k, k_s, channels, DIM, DIM_PAD, not HOLES, WIDE)
        scores = scores_of(query, key, factor, KEY_SCALES, key_tile, INT8, PRECISION)
        if HOLES:
            scores += tl.where(used_k, 0.0, float("-inf"))[None, :]
        if HAS_FRAMES:
            frame_k = (tl.load(COORDS + token_k, mask=used_k, other=0) >> 22) - 2
            add_frame_sums(FRAME_LSE, row_at, used_q, scores, frame_k, FRAME_SPAN, key_tile)
        value = load_rows(V, token_k, used_k, v_s, channels, DIM, DIM_PAD, not HOLES, WIDE)
        acc, top, total = accumulate(scores, value, acc, top, total, HOLES, PRECISION)
    if RULE > 0:
        if RULE == 1:
            ruled = head if RULE_HEADS > 1 else 0
            CLASSES += ruled * frames * frames
            LOW += ruled * classes * 2 * longest
            WIDTH += ruled * classes * 2 * longest
            words_q = tl.load(COORDS + token_q, mask=used_q, other=0)
        for turn in tl.range(ragged * FINE, last * FINE):
            key_tile = tl.load(COLUMNS + turn // FINE)
            lanes = step_lanes(turn, BLOCK_K, FINE)
            token_k, used_k = tile_tokens(KEY_TILES, key_tile, lanes, seqlen_k, BLOCK_K, RUNS_K)
            if MASKED:
                used_k = used_k & (tl.load(KEY_MASK + token_k, mask=used_k, other=0) != 0)
            key = load_rows(K, token_k, used_k, k_s, channels, DIM, DIM_PAD, False, WIDE)
            scores = scores_of(query, key, factor, KEY_SCALES, key_tile, INT8, PRECISION)
            if RULE == 1:
                words_k = tl.load(COORDS + token_k, mask=used_k, other=0)
                scores = hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES, LOW, WIDTH, frames, longest,
                                      extent_y, extent_x, DIL_Y, DIL_X, CIRC_Y, CIRC_X, False)  # fmt: skip
            else:
                slot = tl.load(SLOTS + (head if SLOT_ROWS > 1 else 0) * nnz + turn // FINE)
                seen = bits_visible(BITS, slot, rows, lanes, BLOCK_Q, BLOCK_K)
                scores = tl.where(seen & used_k[None, :], scores, float("-inf"))
            if HAS_FRAMES:
                frame_k = (tl.load(COORDS + token_k, mask=used_k, other=0) >> 22) - 2
                add_frame_sums(FRAME_LSE, row_at, used_q, scores, frame_k, FRAME_SPAN, key_tile)
            value = load_rows(V, token_k, used_k, v_s, channels, DIM, DIM_PAD, False, WIDE)
            acc, top, total = accumulate(scores, value, acc, top, total, True, PRECISION)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    if HAS_MIX:
        # SoftPAG: towards the query's own value, lerp(out, v, u)
        own = load_rows(V, token_q, used_q, v_s, channels, DIM, DIM_PAD, False, WIDE).to(tl.float32)
        acc += tl.load(MIX + head) * (own - acc)
    token_o = token_q.to(tl.int64) if WIDE else token_q
    at = OUT + batch * o_b + head * o_h + token_o[:, None] * o_s + channels[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=used_q[:, None] & (channels < DIM)[None, :])
    tl.store(LSE + (batch * seqlen_q + token_q) * heads + head, lse, mask=used_q)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, KEY_MASK,
    COORDS, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, MIX, FRAME_LSE, QUERY_SCALES, KEY_SCALES, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_FRAMES: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
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
                    Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, KEY_MASK, COORDS,
                    FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, MIX, FRAME_LSE, QUERY_SCALES, KEY_SCALES, scale, q_b,
                    q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, seqlen_q, seqlen_k, heads, group, tiles_q,
                    tiles_k, nnz, frames, classes, longest, extent_y, extent_x, DIM, DIM_PAD, BLOCK_Q, BLOCK_K, SPLIT,
                    FINE, LISTS, RULE, RULE_HEADS, SLOT_ROWS, RUNS_Q, RUNS_K, HOLES, MASKED, WIDE, DIL_Y, DIL_X, CIRC_Y,
                    CIRC_X, HAS_MIX, HAS_FRAMES, INT8, PRECISION
                )  # fmt: skip
    else:
        serve_tile(
            tl.program_id(0), tl.program_id(1),
            Q, K, V, OUT, LSE, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, KEY_MASK, COORDS, FRAME_SPAN,
            CLASSES, LOW, WIDTH, BITS, SLOTS, MIX, FRAME_LSE, QUERY_SCALES, KEY_SCALES, scale, q_b, q_s, q_h, k_b, k_s,
            k_h, v_b, v_s, v_h, o_b, o_s, o_h, seqlen_q, seqlen_k, heads, group, tiles_q, tiles_k, nnz, frames, classes,
            longest, extent_y, extent_x, DIM, DIM_PAD, BLOCK_Q, BLOCK_K, SPLIT, FINE, LISTS, RULE, RULE_HEADS, SLOT_ROWS,
            RUNS_Q, RUNS_K, HOLES, MASKED, WIDE, DIL_Y, DIL_X, CIRC_Y, CIRC_X, HAS_MIX, HAS_FRAMES, INT8, PRECISION
        )  # fmt: skip
