"""Triton backward of block-sparse attention (jitted code only; the host is block_sparse.py).

dQ walks the same lists as the forward. dK and dV walk the inverse lists, one program per key tile and key head, with all query
heads of the group inside: no atomics, so the result is the same bit for bit every time. The probabilities are recomputed
from the saved log-sum-exp (Dao et al., arXiv 2205.14135, Alg. 4).
"""

import triton
import triton.language as tl
from genattn.kernels.triton.forward_kernel import LOG2E, bits_visible, hide_by_grid, load_rows, step_lanes, tile_tokens


@triton.jit
def delta_kernel(OUT, DO, DLSE, DELTA, o_b, o_s, o_h, d_b, d_s, d_h, seqlen, heads,
                 DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    """delta[q] = <out, dout> - dlse: what the softmax's own gradient subtracts."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, DIM_PAD)
    used = token < seqlen
    out = load_rows(OUT + batch * o_b + head * o_h, token, used, o_s, channels, DIM, DIM_PAD, False, True)
    grad = load_rows(DO + batch * d_b + head * d_h, token, used, d_s, channels, DIM, DIM_PAD, False, True)
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


@triton.jit
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, KEY_MASK,
    COORDS, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, d_b, d_s, d_h, g_b, g_s, g_h,
    seqlen_q, seqlen_k, heads, group, tiles_q, nnz, frames, classes, longest, extent_y, extent_x,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, HOLES: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of one tile and head."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    listed = head if LISTS > 1 else 0
    tile = tl.load(ORDER + listed * tiles_q + tl.program_id(0))
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, DIM_PAD)
    token_q, used_q = tile_tokens(QUERY_TILES, tile, rows, seqlen_q, BLOCK_Q, RUNS_Q)
    query = load_rows(Q + batch * q_b + head * q_h, token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE)
    grad = load_rows(DO + batch * d_b + head * d_h, token_q, used_q, d_s, channels, DIM, DIM_PAD, False, WIDE)
    row_at = (batch * seqlen_q + token_q) * heads + head
    lse = load_lse(LSE, row_at, used_q)
    delta = tl.load(DELTA + row_at, mask=used_q, other=0.0)
    K += batch * k_b + (head // group) * k_h
    V += batch * v_b + (head // group) * v_h
    if MASKED:
        KEY_MASK += batch * seqlen_k
    if RULE == 1:
        ruled = head if RULE_HEADS > 1 else 0
        CLASSES += ruled * frames * frames
        LOW += ruled * classes * 2 * longest
        WIDTH += ruled * classes * 2 * longest
        words_q = tl.load(COORDS + token_q, mask=used_q, other=0)
    acc = tl.zeros([BLOCK_Q, DIM_PAD], tl.float32)
    first = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile)
    last = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile + 1)
    ragged = first + tl.load(NUM_FULL + listed * tiles_q + tile)
    for part in tl.static_range(2 if RULE > 0 else 1):
        for turn in tl.range(first * SPLIT if part == 0 else ragged * FINE, ragged * SPLIT if part == 0 else last * FINE):
            key_tile = tl.load(COLUMNS + turn // (SPLIT if part == 0 else FINE))
            lanes = step_lanes(turn, BLOCK_K, SPLIT if part == 0 else FINE)
            token_k, used_k = tile_tokens(KEY_TILES, key_tile, lanes, seqlen_k, BLOCK_K, RUNS_K)
            if MASKED:
                used_k = used_k & (tl.load(KEY_MASK + token_k, mask=used_k, other=0) != 0)
            every: tl.constexpr = part == 0 and not HOLES
            key = load_rows(K, token_k, used_k, k_s, channels, DIM, DIM_PAD, every, WIDE)
            value = load_rows(V, token_k, used_k, v_s, channels, DIM, DIM_PAD, every, WIDE)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
            if part == 1:
                if RULE == 1:
                    words_k = tl.load(COORDS + token_k, mask=used_k, other=0)
                    scores = hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES, LOW, WIDTH, frames, longest,
                                          extent_y, extent_x, DIL_Y, DIL_X, CIRC_Y, CIRC_X, False)  # fmt: skip
                else:
                    slot = tl.load(SLOTS + (head if SLOT_ROWS > 1 else 0) * nnz + turn // (SPLIT if part == 0 else FINE))
                    seen = bits_visible(BITS, slot, rows, lanes, BLOCK_Q, BLOCK_K)
                    scores = tl.where(seen & used_k[None, :], scores, float("-inf"))
            elif HOLES:
                scores += tl.where(used_k, 0.0, float("-inf"))[None, :]
            probs = tl.exp2(scores - lse[:, None])
            slope = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
            acc = tl.dot((probs * slope).to(key.dtype), key, acc, input_precision=PRECISION)
    token_o = token_q.to(tl.int64) if WIDE else token_q
    at = DQ + batch * g_b + head * g_h + token_o[:, None] * g_s + channels[None, :]
    tl.store(at, (acc * scale).to(DQ.dtype.element_ty), mask=used_q[:, None] & (channels < DIM)[None, :])


@triton.jit
def dkv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, QUERY_TILES, KEY_TILES, ROW_PTR, COLUMNS, NUM_FULL, ORDER, ENTRY, KEY_MASK,
    COORDS, FRAME_SPAN, CLASSES, LOW, WIDTH, BITS, SLOTS, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, d_b, d_s, d_h, g_b, g_s, g_h,
    seqlen_q, seqlen_k, heads, group, tiles_k, nnz, frames, classes, longest, extent_y, extent_x,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, FINE: tl.constexpr, LISTS: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RUNS_Q: tl.constexpr, RUNS_K: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    DIL_Y: tl.constexpr, DIL_X: tl.constexpr, CIRC_Y: tl.constexpr, CIRC_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one tile and key head; scores are held transposed, [BK, BQ]."""
    kv_heads = heads // group
    kv_head = tl.program_id(1) % kv_heads
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    channels = tl.arange(0, DIM_PAD)
    key_tile = tl.load(ORDER + tl.program_id(0))
    token_k, used_k = tile_tokens(KEY_TILES, key_tile, lanes, seqlen_k, BLOCK_K, RUNS_K)
    stored = used_k
    if MASKED:
        used_k = used_k & (tl.load(KEY_MASK + batch * seqlen_k + token_k, mask=used_k, other=0) != 0)
    key = load_rows(K + batch * k_b + kv_head * k_h, token_k, used_k, k_s, channels, DIM, DIM_PAD, False, WIDE)
    value = load_rows(V + batch * v_b + kv_head * v_h, token_k, used_k, v_s, channels, DIM, DIM_PAD, False, WIDE)
    hidden = tl.where(used_k, 0.0, float("-inf"))
    if RULE == 1:
        words_k = tl.load(COORDS + token_k, mask=used_k, other=0)
    grad_k = tl.zeros([BLOCK_K, DIM_PAD], tl.float32)
    grad_v = tl.zeros([BLOCK_K, DIM_PAD], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        listed = head if LISTS > 1 else 0
        ruled = head if RULE_HEADS > 1 else 0
        first = tl.load(ROW_PTR + listed * (tiles_k + 1) + key_tile)
        last = tl.load(ROW_PTR + listed * (tiles_k + 1) + key_tile + 1)
        ragged = first + tl.load(NUM_FULL + listed * tiles_k + key_tile)
        for part in tl.static_range(2 if RULE > 0 else 1):
            begin = first * SPLIT if part == 0 else ragged * FINE
            for turn in tl.range(begin, ragged * SPLIT if part == 0 else last * FINE):
                tile = tl.load(COLUMNS + turn // (SPLIT if part == 0 else FINE))
                rows = step_lanes(turn, BLOCK_Q, SPLIT if part == 0 else FINE)
                token_q, used_q = tile_tokens(QUERY_TILES, tile, rows, seqlen_q, BLOCK_Q, RUNS_Q)
                query = load_rows(Q + batch * q_b + head * q_h, token_q, used_q, q_s, channels, DIM, DIM_PAD, False, WIDE)
                grad = load_rows(DO + batch * d_b + head * d_h, token_q, used_q, d_s, channels, DIM, DIM_PAD, False, WIDE)
                row_at = (batch * seqlen_q + token_q) * heads + head
                lse = load_lse(LSE, row_at, used_q)
                delta = tl.load(DELTA + row_at, mask=used_q, other=0.0)
                scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) + hidden[:, None]
                if part == 1:
                    if RULE == 1:
                        words_q = tl.load(COORDS + token_q, mask=used_q, other=0)
                        scores = hide_by_grid(scores, words_q, words_k, FRAME_SPAN, key_tile, CLASSES + ruled * frames * frames,
                                              LOW + ruled * classes * 2 * longest, WIDTH + ruled * classes * 2 * longest,
                                              frames, longest,
                                              extent_y, extent_x, DIL_Y, DIL_X, CIRC_Y, CIRC_X, True)  # fmt: skip
                    else:
                        place = tl.load(ENTRY + turn // (SPLIT if part == 0 else FINE))
                        slot = tl.load(SLOTS + (head if SLOT_ROWS > 1 else 0) * nnz + place)
                        seen = bits_visible(BITS, slot, rows, lanes, BLOCK_Q, BLOCK_K)
                        scores = tl.where(tl.trans(seen), scores, float("-inf"))
                probs = tl.exp2(scores - lse[None, :])
                grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
                slope = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
                grad_k = tl.dot((probs * slope).to(query.dtype), query, grad_k, input_precision=PRECISION)
    token_o = token_k.to(tl.int64) if WIDE else token_k
    at = batch * g_b + kv_head * g_h + token_o[:, None] * g_s + channels[None, :]
    keep = stored[:, None] & (channels < DIM)[None, :]
    tl.store(DK + at, (grad_k * scale).to(DK.dtype.element_ty), mask=keep)
    tl.store(DV + at, grad_v.to(DV.dtype.element_ty), mask=keep)
