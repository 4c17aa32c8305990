"""Triton forward over full tiles only, warp-specialised where chip and compiler can (jitted code only; host: full_tiles.py).

Every visited tile is seen whole, and a tile is a run of tokens from any first one on, so rows come through tensor descriptors
(TMA): the shape of loop that Triton's automatic warp specialisation accepts on Hopper, and there with 4 warps only. With 8 it
is ignored without a word; a second loop or rows by pointer end in a failed compile. Lanes behind a tile's last token hold the
next tile's: their scores are taken out by their count, and a descriptor of the query tile alone keeps its rows from being
written. Online softmax as in forward_kernel.py.
"""

import triton
import triton.language as tl
from genattn.kernels.triton.forward_kernel import LN2, LOG2E, SIZES, STRIDES, accumulate, hide_unused


@triton.jit(do_not_specialize=[name for name in SIZES if name not in STRIDES])
def full_tiles_kernel(
    Q, K, V, OUT, LSE, ROW_PTR, COLUMNS, ORDER, QUERY_FIRST, QUERY_COUNTS, KEY_FIRST, KEY_COUNTS, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    seqlen_q, seqlen_k, heads, group, tiles_q,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTS: tl.constexpr,
    HOLES: tl.constexpr, LEAST: tl.constexpr, SPECIALISED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head. DIM is a power of two."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    listed = head if LISTS > 1 else 0
    tile = tl.load(ORDER + listed * tiles_q + tl.program_id(0))
    kv_head = head // group
    begin = tl.load(QUERY_FIRST + tile)
    end = begin + tl.load(QUERY_COUNTS + tile)
    queries = tl.make_tensor_descriptor(Q + batch * q_b + head.to(tl.int64) * q_h, [end, DIM], [q_s, 1], [BLOCK_Q, DIM])
    keys = tl.make_tensor_descriptor(K + batch * k_b + kv_head.to(tl.int64) * k_h, [seqlen_k, DIM], [k_s, 1], [BLOCK_K, DIM])
    values = tl.make_tensor_descriptor(V + batch * v_b + kv_head.to(tl.int64) * v_h, [seqlen_k, DIM], [v_s, 1], [BLOCK_K, DIM])
    outs = tl.make_tensor_descriptor(OUT + batch * o_b + head.to(tl.int64) * o_h, [end, DIM], [o_s, 1], [BLOCK_Q, DIM])
    query = queries.load([begin, 0])
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
    factor = scale * LOG2E
    first = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile)
    last = tl.load(ROW_PTR + listed * (tiles_q + 1) + tile + 1)
    for turn in tl.range(first, last, warp_specialize=SPECIALISED, num_stages=STAGES):
        key_tile = tl.load(COLUMNS + turn)
        at = tl.load(KEY_FIRST + key_tile)
        key = keys.load([at, 0])
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = hide_unused(scores, KEY_COUNTS, KEY_FIRST, key_tile, tl.arange(0, BLOCK_K), HOLES, LEAST, BLOCK_K)
        value = values.load([at, 0])
        acc, top, total = accumulate(scores, factor, value, acc, top, total, False, PRECISION)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    outs.store([begin, 0], acc.to(OUT.dtype.element_ty))
    token = begin + tl.arange(0, BLOCK_Q)
    tl.store(LSE + (batch * seqlen_q + token) * heads + head, lse, mask=token < end)
