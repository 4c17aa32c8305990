"""Triton backward of block-sparse attention (jitted code only; the host is block_sparse.py).

dQ walks the same lists as the forward. dK and dV walk the inverse lists, one program per key tile and key head, with all query
heads of the group inside: no atomics, so the result is the same bit for bit every time. The probabilities are recomputed
from the saved log-sum-exp (Dao et al., arXiv 2205.14135, Alg. 4). Tokens and tiles are carried through the loops as in the
forward.
"""

import triton
import triton.language as tl
from genattn.kernels.triton.fade_kernel import ends_of, ends_of_pseudo, lowering
from genattn.kernels.triton.forward_kernel import (
    LOG2E,
    SIZES,
    bits_visible,
    hide_by_grid,
    hide_unused,
    lane_tokens,
    listed_tile,
    load_rows,
    step_lanes,
    store_rows,
    tail_bias,
    turn_tokens,
    view_at,
)


@triton.jit(do_not_specialize=[*SIZES, "seqlen"])
def delta_kernel(OUT, DO, DLSE, DELTA, o_b, o_s, o_h, d_b, d_s, d_h, seqlen, heads,
                 DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_DLSE: tl.constexpr,
                 ALIGN: tl.constexpr):  # fmt: skip
    """delta[q] = <out, dout> - dlse: what the softmax's own gradient subtracts."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, DIM_PAD)
    used = token < seqlen
    out = load_rows(OUT + view_at(batch, head, o_b, o_h, ALIGN), token, used, o_s, channels, DIM, DIM_PAD, False, True, ALIGN)
    grad = load_rows(DO + view_at(batch, head, d_b, d_h, ALIGN), token, used, d_s, channels, DIM, DIM_PAD, False, True, ALIGN)
    at = (batch * seqlen + token) * heads + head
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + at, mask=used, other=0.0)
    tl.store(DELTA + at, delta, mask=used)


@triton.jit
def load_lse(LSE, at, used):
    """Log-sum-exp in base 2; +inf where there is nothing, so that every probability becomes 0."""
    lse = tl.load(LSE + at, mask=used, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, QUERY_TILES, KEY_TILES, KEY_COUNTS, ROW_PTR, COLUMNS, NUM_FULL, ORDER,
    WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED,
    WINDOW, SPAN, scale, fade_factor, fade_off,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, d_b, d_s, d_h, g_b, g_s, g_h, t_b, t_s, t_h, tiles_b, counts_b,
    seqlen_q, seqlen_k, heads, group, tiles_q, nnz, frames, classes, longest, extent_y, extent_x, pseudo, tail_words,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, LEAST: tl.constexpr, GUARDED: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    TAIL: tl.constexpr, FADE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of one tile and head."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    listed = head if LISTS > 1 else 0
    tile = tl.load(ORDER + listed * tiles_q + tl.program_id(0))
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, DIM_PAD)
    token_q = lane_tokens(QUERY_TILES, tile, rows, seqlen_q, BLOCK_Q, RUNS_Q)
    used_q = token_q >= 0
    token_q = token_q ^ (token_q >> 31)
    query = load_rows(
        Q + view_at(batch, head, q_b, q_h, ALIGN), token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    grad = load_rows(
        DO + view_at(batch, head, d_b, d_h, ALIGN), token_q, used_q, d_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    row_at = (batch * seqlen_q + token_q) * heads + head
    lse = load_lse(LSE, row_at, used_q)
    delta = tl.load(DELTA + row_at, mask=used_q, other=0.0)
    K += view_at(batch, head // group, k_b, k_h, ALIGN)
    V += view_at(batch, head // group, v_b, v_h, ALIGN)
    KEY_TILES += batch * tiles_b
    WORDS_K += batch * tiles_b
    KEY_COUNTS += batch * counts_b
    if RULE == 1:
        ruled = head if RULE_HEADS > 1 else 0
        CLASSES += ruled * frames * frames
        LOW += ruled * classes * 2 * longest
        WIDTH += ruled * classes * 2 * longest
        words_q = tl.load(WORDS_Q + tile * BLOCK_Q + rows)
    factor = scale * LOG2E
    if FADE:
        low, high = ends_of(WINDOW, tile)
    acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)
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
                probs = tl.exp2(scores * (factor * weight) - (lse + off)[:, None])
            else:
                probs = tl.exp2(scores * factor - lse[:, None])
            slope = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
            if FADE:
                slope *= weight
            acc = tl.dot((probs * slope).to(key.dtype), key, acc, input_precision=PRECISION)
            token_k = turn_tokens(KEY_TILES, next_tile, turn + 1, seqlen_k, BLOCK_K, SPLIT if part == 0 else FINE, RUNS_K)
            # loaded again: a value handed on through two turns would keep the compiler from prefetching
            key_tile = listed_tile(COLUMNS, turn + 1, end, SPLIT if part == 0 else FINE)
            next_tile = listed_tile(COLUMNS, turn + 2, end, SPLIT if part == 0 else FINE)
    if TAIL > 0:
        TAIL_K += view_at(batch, head // group, t_b, t_h, ALIGN)
        TAIL_V += view_at(batch, head // group, t_b, t_h, ALIGN)
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
            weights = TAIL_BIAS + (batch * (heads // group) + head // group) * pseudo
            scores += tail_bias(weights, SKIPPED, at, inside, TAIL)[None, :]
            probs = tl.exp2(scores * factor - lse[:, None])
            slope = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
            if FADE:
                slope *= weight[None, :]
            acc = tl.dot((probs * slope).to(key.dtype), key, acc, input_precision=PRECISION)
    store_rows(DQ + view_at(batch, head, g_b, g_h, ALIGN), acc * scale, token_q, used_q, g_s, channels, DIM, WIDE, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, ENTRY,
    WORDS_Q, WORDS_K, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, WINDOW, SPAN, scale, fade_factor, fade_off,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, d_b, d_s, d_h, g_b, g_s, g_h, tiles_b,
    seqlen_q, seqlen_k, heads, group, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr,
    FADE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one tile and key head; scores are held transposed, [BK, BQ]. Rows of hidden keys are
    left as the caller filled them: zero."""
    kv_heads = heads // group
    kv_head = tl.program_id(1) % kv_heads
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, DIM_PAD)
    key_tile = tl.load(ORDER + tl.program_id(0))
    token_k = lane_tokens(KEY_TILES + batch * tiles_b, key_tile, lanes, seqlen_k, BLOCK_K, RUNS_K)
    used_k = token_k >= 0
    token_k = token_k ^ (token_k >> 31)
    key = load_rows(
        K + view_at(batch, kv_head, k_b, k_h, ALIGN), token_k, used_k, k_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    value = load_rows(
        V + view_at(batch, kv_head, v_b, v_h, ALIGN), token_k, used_k, v_s, channels, DIM, DIM_PAD, False, WIDE, ALIGN
    )
    hidden = tl.where(used_k, 0.0, float("-inf"))
    if RULE == 1:
        words_k = tl.load(WORDS_K + batch * tiles_b + key_tile * BLOCK_K + lanes)
    factor = scale * LOG2E
    if FADE:
        from_place, to_place = ends_of(SPAN, key_tile)
    grad_k = tl.zeros([BLOCK_K, DIM_PAD], tl.float32)
    grad_v = tl.zeros([BLOCK_K, DIM_PAD], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        listed = head if LISTS > 1 else 0
        ruled = head if RULE_HEADS > 1 else 0
        queries, grads = Q + view_at(batch, head, q_b, q_h, ALIGN), DO + view_at(batch, head, d_b, d_h, ALIGN)
        first = tl.load(ROW_PTR + listed * (tiles_k + 1) + key_tile)
        last = tl.load(ROW_PTR + listed * (tiles_k + 1) + key_tile + 1)
        ragged = first + tl.load(NUM_FULL + listed * tiles_k + key_tile)
        for part in tl.static_range(2 if RULE > 0 else 1):
            begin = first * SPLIT if part == 0 else ragged * FINE
            end = ragged * SPLIT if part == 0 else last * FINE
            tile = listed_tile(COLUMNS, begin, end, SPLIT if part == 0 else FINE)
            token_q = turn_tokens(QUERY_TILES, tile, begin, seqlen_q, BLOCK_Q, SPLIT if part == 0 else FINE, RUNS_Q)
            next_tile = listed_tile(COLUMNS, begin + 1, end, SPLIT if part == 0 else FINE)
            for turn in tl.range(begin, end):
                rows = step_lanes(turn, BLOCK_Q, SPLIT if part == 0 else FINE)
                used_q = token_q >= 0
                row_q = token_q ^ (token_q >> 31)
                query = load_rows(queries, row_q, used_q, q_s, channels, DIM, DIM_PAD, True, WIDE, ALIGN)
                grad = load_rows(grads, row_q, used_q, d_s, channels, DIM, DIM_PAD, True, WIDE, ALIGN)
                lse = load_lse(LSE + batch * seqlen_q * heads + head, row_q * heads, used_q)
                delta = tl.load(DELTA + batch * seqlen_q * heads + head + row_q * heads, mask=used_q, other=0.0)
                scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                if part == 1:
                    if RULE == 1:
                        words_q = tl.load(WORDS_Q + tile * BLOCK_Q + rows)
                        scores = hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES + ruled * frames * frames,
                                              LOW + ruled * classes * 2 * longest, WIDTH + ruled * classes * 2 * longest,
                                              frames, longest,
                                              extent_y, extent_x, DIL_Y, DIL_X, CIRC_Y, CIRC_X, True)  # fmt: skip
                    else:
                        place = tl.load(ENTRY + turn // (SPLIT if part == 0 else FINE))
                        slot = tl.load(SLOTS + (head if SLOT_ROWS > 1 else 0) * nnz + place)
                        seen = bits_visible(BITS, slot, rows, lanes, BLOCK_Q, BLOCK_K)
                        scores = tl.where(tl.trans(seen), scores, float("-inf"))
                if FADE:
                    low, high = ends_of(WINDOW, tile)
                    weight, off = lowering(low, high, from_place, to_place, fade_factor, fade_off)
                    probs = tl.exp2((scores + hidden[:, None]) * (factor * weight) - (lse + off)[None, :])
                else:
                    probs = tl.exp2((scores + hidden[:, None]) * factor - lse[None, :])
                grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
                slope = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
                if FADE:
                    slope *= weight
                grad_k = tl.dot((probs * slope).to(query.dtype), query, grad_k, input_precision=PRECISION)
                token_q = turn_tokens(QUERY_TILES, next_tile, turn + 1, seqlen_q, BLOCK_Q, SPLIT if part == 0 else FINE, RUNS_Q)
                tile = listed_tile(COLUMNS, turn + 1, end, SPLIT if part == 0 else FINE)
                next_tile = listed_tile(COLUMNS, turn + 2, end, SPLIT if part == 0 else FINE)
    at = view_at(batch, kv_head, g_b, g_h, ALIGN)
    store_rows(DK + at, grad_k * scale, token_k, used_k, g_s, channels, DIM, WIDE, ALIGN)
    store_rows(DV + at, grad_v, token_k, used_k, g_s, channels, DIM, WIDE, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def tail_dkv_kernel(
    Q, DO, LSE, DELTA, TAIL_K, TAIL_V, TAIL_BIAS, SKIPPED, WINDOW, SPAN, DK, DV, QUERY_TILES, scale, fade_factor, fade_off,
    q_b, q_s, q_h, d_b, d_s, d_h, t_b, t_s, t_h, g_b, g_s, g_h,
    seqlen_q, heads, group, tiles_q, pseudo, tail_words,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, SPLIT: tl.constexpr,
    LISTS: tl.constexpr, RUNS_Q: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, TAIL: tl.constexpr,
    FADE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_P pseudo-keys and their values of one key head, over every query tile; float32."""
    kv_heads = heads // group
    kv_head = tl.program_id(1) % kv_heads
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    channels = tl.arange(0, DIM_PAD)
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = at < pseudo
    TAIL_K += view_at(batch, kv_head, t_b, t_h, ALIGN)
    TAIL_V += view_at(batch, kv_head, t_b, t_h, ALIGN)
    key = load_rows(TAIL_K, at, inside, t_s, channels, DIM, DIM_PAD, False, False, ALIGN)
    value = load_rows(TAIL_V, at, inside, t_s, channels, DIM, DIM_PAD, False, False, ALIGN)
    factor = scale * LOG2E
    if FADE:
        from_place, to_place = ends_of_pseudo(SPAN, at, inside, TAIL)
    grad_k = tl.zeros([BLOCK_P, DIM_PAD], tl.float32)
    grad_v = tl.zeros([BLOCK_P, DIM_PAD], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        listed = head if LISTS > 1 else 0
        queries, grads = Q + view_at(batch, head, q_b, q_h, ALIGN), DO + view_at(batch, head, d_b, d_h, ALIGN)
        for turn in tl.range(0, tiles_q * SPLIT):
            token_q = turn_tokens(QUERY_TILES, turn // SPLIT, turn, seqlen_q, BLOCK_Q, SPLIT, RUNS_Q)
            used_q = token_q >= 0
            row_q = token_q ^ (token_q >> 31)
            query = load_rows(queries, row_q, used_q, q_s, channels, DIM, DIM_PAD, True, WIDE, ALIGN)
            grad = load_rows(grads, row_q, used_q, d_s, channels, DIM, DIM_PAD, True, WIDE, ALIGN)
            lse = load_lse(LSE + batch * seqlen_q * heads + head, row_q * heads, used_q)
            delta = tl.load(DELTA + batch * seqlen_q * heads + head + row_q * heads, mask=used_q, other=0.0)
            words = SKIPPED + (listed * tiles_q + turn // SPLIT) * tail_words
            bias = tail_bias(TAIL_BIAS + (batch * kv_heads + kv_head) * pseudo, words, at, inside, TAIL)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            if FADE:
                low, high = ends_of(WINDOW, turn // SPLIT)
                weight, off = lowering(low, high, from_place, to_place, fade_factor, fade_off)
                scores = scores * weight[:, None] - (off / factor)[:, None]
            scores += bias[:, None]
            probs = tl.exp2(scores * factor - lse[None, :])
            grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
            slope = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
            if FADE:
                slope *= weight[:, None]
            grad_k = tl.dot((probs * slope).to(query.dtype), query, grad_k, input_precision=PRECISION)
    place = view_at(batch, kv_head, g_b, g_h, ALIGN)
    store_rows(DK + place, grad_k * scale, at, inside, g_s, channels, DIM, False, ALIGN)
    store_rows(DV + place, grad_v, at, inside, g_s, channels, DIM, False, ALIGN)
