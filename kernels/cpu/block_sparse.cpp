// Block-sparse attention forward on the CPU: flash-style online softmax over listed key tiles, fp32 arithmetic.
//
// Per (batch, key head) the key tiles are gathered by token index and packed once: K transposed, both in column panels as wide
// as the micro-kernel. Then query tiles are dealt to threads. Vector code is GCC/Clang vector extensions; the width is fixed at
// compile time by the target. Plain C interface, no torch headers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "call.h"
#include "rules.h"
#include "stand_ins.h"
#include "vectors.h"

constexpr int NEAR = 4 * MR;  // query rows whose scores of one tile stay in the nearest cache

// ---- one query tile

struct Scratch {
  std::vector<float> q, s, acc, m, l, tail_rows, tail_keys, tail_values, tail_bias;
  std::vector<int32_t> chosen;
  std::vector<uint16_t> bits;
};

// what becomes of the scores of a tile pair: x * factor - off, in base 2
struct Fade { float factor, off; };
constexpr Fade INSIDE = {1.f, 0.f};

static inline bool is_outside(const Call& c, int tile, int kt) {
  if (!c.fade_window) return false;
  const int32_t *window = c.fade_window + (size_t)tile * 2, *span = c.fade_span + (size_t)kt * 2;
  return span[1] < window[0] || span[0] > window[1];
}

static inline Fade fade_of(const Call& c, bool outside) { return outside ? Fade{c.fade_factor, c.fade_penalty * 1.4426950408889634f} : INSIDE; }

// online softmax of lanes [from, to) of one row of scores; `bias` is null or 0 / -inf per lane, `seen` null or one bit per lane
static inline void softmax_row(float* s, int from, int to, float& m, float& l, float* acc, int acc_width, const float* bias, const uint16_t* seen, Fade fade) {
  vf top = splat(-INFINITY);
  if (!seen && !bias) {
    for (int j = from; j < to; j += VL) top = larger(top, load(s + j));
  } else {
    for (int j = from; j < to; j += VL) {
      vf x = load(s + j);
      if (seen) x = hide(x, seen, j);
      if (bias) x += load(bias + j);
      store(s + j, x);
      top = larger(top, x);
    }
  }
  float high = max_of(top) * fade.factor - fade.off;
  high = high > m ? high : m;
  vf offset = splat((high == -INFINITY ? 0.f : high) + fade.off), factor = splat(fade.factor), sum = {};
  for (int j = from; j < to; j += VL) {
    vf p = exp2v(load(s + j) * factor - offset);
    store(s + j, p);
    sum += p;
  }
  if (high != m) {
    float shrink = exp2f(m - high);
    l *= shrink;
    for (int d = 0; d < acc_width; d += VL) store(acc + d, load(acc + d) * shrink);
    m = high;
  }
  l += sum_of(sum);
}

// bring the i-th of n shares of a tile near, while the softmax keeps the arithmetic units busy
static inline void fetch_share(const float* tile, int floats, int i, int n) {
  for (int at = (int)((int64_t)floats * i / n) & ~15; at < (int64_t)floats * (i + 1) / n; at += 16) __builtin_prefetch(tile + at, 0, 2);
}

// one visited tile pair: scores, softmax, and the weighted values into the accumulator
static void visit(const Call& c, const Packed& kv, Scratch& w, int kt, int next_kt, Span span, const uint16_t* bits, Fade fade) {
  const int D = c.dim, DP = round_up(D, VL), BK = round_up(c.block_k, VL), words = (c.block_k + 15) / 16;
  const float* bias = kv.holes[kt] ? kv.bias + (size_t)kt * BK : nullptr;
  const float *keys = kv.keys + (size_t)kt * BK * D, *values = kv.values + (size_t)kt * BK * DP, *next = kv.keys + (size_t)next_kt * BK * D;
  float* s = w.s.data();
  for (int top = span.top; top < span.bottom; top += NEAR) {
    const int rows = std::min(NEAR, span.bottom - top);
    float* acc = &w.acc[(size_t)top * DP];
    product<false>(&w.q[(size_t)top * D], D, keys, s, BK, rows, D, BK, D, 0, span.left, span.right);
    for (int i = 0; i < rows; i++) {
      if (top == span.top) fetch_share(values + (size_t)span.left * NR, (span.right - span.left) * DP, i, rows);
      fetch_share(next, BK * D, top - span.top + i, span.bottom - span.top);
      const uint16_t* seen = bits ? bits + (size_t)(top + i) * words : nullptr;
      softmax_row(s + (size_t)i * BK, span.left, span.right, w.m[top + i], w.l[top + i], acc + (size_t)i * DP, DP, bias, seen, fade);
    }
    product<true>(s + span.left, BK, values, acc, DP, rows, span.right - span.left, DP, BK, span.left, 0, DP);
  }
}

// the pseudo-keys of the tiles that the query tile skips and that are outside or not, into w.chosen; how many
static int choose_pseudo(const Call& c, const Packed& kv, Scratch& w, const int32_t* skipped, int of_tile, bool outside) {
  int n = 0;
  for (int tile = 0; tile < c.pseudo / c.tail_parts; tile++) {
    if (!((uint32_t)skipped[tile / 32] >> (tile % 32) & 1) || is_outside(c, of_tile, tile) != outside) continue;
    for (int lane = tile * c.tail_parts; lane < (tile + 1) * c.tail_parts; lane++)
      if (kv.tail_bias[lane] != -INFINITY) w.chosen[n++] = lane;
  }
  return n;
}

// n chosen pseudo-keys side by side in w, as panels of keys and of channels; lanes up to a whole vector are hidden
static void gather_pseudo(const Call& c, const Packed& kv, Scratch& w, const int32_t* chosen, int n, Fade fade) {
  const int D = c.dim, DP = round_up(D, VL), lanes = round_up(n, VL);
  std::fill(w.tail_rows.begin() + (size_t)n * D, w.tail_rows.begin() + (size_t)lanes * D, 0.f);
  std::fill(w.tail_bias.begin() + n, w.tail_bias.begin() + lanes, -INFINITY);
  for (int i = 0; i < n; i++) {
    w.tail_bias[i] = kv.tail_bias[chosen[i]] / fade.factor;  // a weight is no logit
    memcpy(&w.tail_rows[(size_t)i * D], kv.tail_keys + (size_t)chosen[i] * D, (size_t)D * 4);
    for (int d = 0; d < DP; d += NR) {
      const int wide = std::min(NR, DP - d);
      memcpy(&w.tail_values[(size_t)d * n + (size_t)i * wide], kv.tail_values + (size_t)chosen[i] * DP + d, (size_t)wide * 4);
    }
  }
  as_panels(w.tail_rows.data(), w.tail_keys.data(), lanes, D);
}

// the pseudo-keys of skipped tiles, outside or not, as few more tiles whose lanes have weights
static void visit_tail(const Call& c, const Packed& kv, Scratch& w, const int32_t* skipped, int used, int of_tile, bool outside) {
  const int D = c.dim, DP = round_up(D, VL), BK = round_up(c.block_k, VL), all = choose_pseudo(c, kv, w, skipped, of_tile, outside);
  const Fade fade = fade_of(c, outside);
  float* s = w.s.data();
  for (int at = 0; at < all; at += BK) {
    const int n = std::min(BK, all - at), lanes = round_up(n, VL);
    gather_pseudo(c, kv, w, &w.chosen[at], n, fade);
    for (int top = 0; top < used; top += NEAR) {
      const int rows = std::min(NEAR, used - top);
      float* acc = &w.acc[(size_t)top * DP];
      product<false>(&w.q[(size_t)top * D], D, w.tail_keys.data(), s, BK, rows, D, lanes, D, 0, 0, lanes);
      for (int i = 0; i < rows; i++)
        softmax_row(s + (size_t)i * BK, 0, lanes, w.m[top + i], w.l[top + i], acc + (size_t)i * DP, DP, w.tail_bias.data(), nullptr, fade);
      product<true>(s, BK, w.tail_values.data(), acc, DP, rows, n, DP, n, 0, 0, DP);
    }
  }
}

template <typename T>
static void query_tile(const Call& c, const Packed& kv, const std::vector<KeyTile>& tiles, Scratch& w, int b, int h, int tile) {
  const int D = c.dim, DP = round_up(D, VL), BQ = c.block_q, BK = round_up(c.block_k, VL), words = (c.block_k + 15) / 16;
  const int32_t* lanes = c.query_tiles + (size_t)tile * BQ;
  const int list = c.lists == 1 ? 0 : h;
  const float factor = c.scale * 1.4426950408889634f;
  int used = 0;
  for (int i = 0; i < BQ; i++) {
    float* row = &w.q[(size_t)i * D];
    if (lanes[i] < 0) { std::fill(row, row + D, 0.f); continue; }
    used = i + 1;
    const T* src = (const T*)c.query + b * c.stride[0][0] + lanes[i] * c.stride[0][1] + h * c.stride[0][2];
    for (int d = 0; d < D; d++) row[d] = src[d].get() * factor;
  }
  std::fill(w.acc.begin(), w.acc.end(), 0.f);
  std::fill(w.m.begin(), w.m.end(), -INFINITY);
  std::fill(w.l.begin(), w.l.end(), 0.f);
  const int32_t* ptr = c.row_ptr + (size_t)list * (c.tiles_q + 1) + tile;
  const int64_t first = ptr[0], last = ptr[1], ragged = first + c.num_full[(size_t)list * c.tiles_q + tile];
  for (int64_t e = first; e < last; e++) {
    const int kt = c.columns[e], next = c.columns[e + 1 < last ? e + 1 : e];
    Span span{0, kv.used[kt], 0, (int16_t)used};
    const uint16_t* bits = nullptr;
    if (e >= ragged && c.slots) {
      const size_t slot = c.slots[(c.slot_rows == 1 ? 0 : h) * c.nnz + e];
      bits = c.bits + slot * BQ * words;
      memcpy(&span, c.spans + slot * 4, sizeof span);
    } else if (e >= ragged) {
      const Rule& r = c.rules[c.rule_of_head[h]];
      span = rule_tile(w.bits.data(), r, r.heads == 1 ? 0 : h, lanes, tiles[(size_t)c.rule_of_head[h] * c.tiles_k + kt], BQ, words, BK);
      bits = w.bits.data();
    }
    if (span.right > span.left && span.bottom > span.top) visit(c, kv, w, kt, next, span, bits, fade_of(c, is_outside(c, tile, kt)));
  }
  if (c.pseudo) {
    const int32_t* skipped = c.tail_skipped + ((size_t)list * c.tiles_q + tile) * ((c.tiles_k + 31) / 32);
    for (int outside = 0; outside < (c.fade_window ? 2 : 1); outside++) visit_tail(c, kv, w, skipped, used, tile, outside);
  }
  for (int i = 0; i < BQ; i++) {
    if (lanes[i] < 0) continue;
    const float l = w.l[i], inverse = l == 0.f ? 0.f : 1.f / l;
    T* dst = (T*)c.out + b * c.stride[3][0] + lanes[i] * c.stride[3][1] + h * c.stride[3][2];
    for (int d = 0; d < D; d++) dst[d].set(w.acc[(size_t)i * DP + d] * inverse);
    c.lse[((size_t)b * c.seqlen_q + lanes[i]) * c.heads + h] = l == 0.f ? -INFINITY : (w.m[i] + log2f(l)) * 0.69314718055994531f;
  }
}

// ---- packing

// gather one key tile: K transposed into panels of keys, V into panels of channels; hidden lanes are zero with bias -inf
template <typename T>
static void pack_tile(const Call& c, const Packed& kv, std::vector<float>& rows, int b, int kh, int kt) {
  const int D = c.dim, DP = round_up(D, VL), BK = round_up(c.block_k, VL);
  const int32_t* lanes = c.key_tiles + (size_t)kt * c.block_k;
  float *keys = kv.keys + (size_t)kt * BK * D, *values = kv.values + (size_t)kt * BK * DP, *bias = kv.bias + (size_t)kt * BK;
  kv.holes[kt] = 0;
  kv.used[kt] = 0;
  for (int i = 0; i < BK; i++) {
    bool used = i < c.block_k && lanes[i] >= 0 && (!c.key_mask || c.key_mask[(size_t)b * c.seqlen_k + lanes[i]]);
    bias[i] = used ? 0.f : -INFINITY;
    if (used) kv.used[kt] = (int16_t)round_up(i + 1, VL);
    else kv.holes[kt] = 1;
    const T* k = used ? (const T*)c.key + b * c.stride[1][0] + lanes[i] * c.stride[1][1] + kh * c.stride[1][2] : nullptr;
    as_floats(k, &rows[(size_t)i * D], D);
  }
  as_panels(rows.data(), keys, BK, D);
  for (int i = 0; i < BK; i++) {
    const T* v = bias[i] == 0.f ? (const T*)c.value + b * c.stride[2][0] + lanes[i] * c.stride[2][1] + kh * c.stride[2][2] : nullptr;
    for (int at = 0; at < DP; at += NR) {
      const int width = std::min(NR, DP - at);
      const int there = std::min(width, D - at);
      float* dst = values + (size_t)at * BK + (size_t)i * width;
      as_floats(v ? v + at : nullptr, dst, there);
      memset(dst + there, 0, (size_t)(width - there) * 4);
    }
  }
}

static void* take(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

template <typename T>
static int run(const Call& c) {
  const int DP = round_up(c.dim, VL), BK = round_up(c.block_k, VL), group = c.heads / c.kv_heads;
  const size_t key_floats = (size_t)c.tiles_k * BK * c.dim, value_floats = (size_t)c.tiles_k * BK * DP, lane_floats = (size_t)c.tiles_k * BK;
  const int64_t total = (int64_t)c.batch * c.kv_heads;
  const size_t tail_floats = (size_t)c.pseudo * (c.dim + DP + 1);
  const int64_t fit = std::max<int64_t>(1, c.workspace / (int64_t)((key_floats + value_floats + lane_floats + tail_floats) * 4));
  const int64_t chunk = std::min(total, fit);
  const int rules = c.rules && !c.slots ? rule_count(c) : 0;
  std::vector<KeyTile> tiles((size_t)rules * c.tiles_k);
  std::vector<Packed> packed(chunk);
  bool ok = true;
  for (auto& p : packed) {
    p = {(float*)take(key_floats * 4), (float*)take(value_floats * 4), (float*)take(lane_floats * 4), (uint8_t*)take(c.tiles_k), (int16_t*)take((size_t)c.tiles_k * 2), nullptr, nullptr, nullptr};
    ok = ok && p.keys && p.values && p.bias && p.holes && p.used;
    if (!c.pseudo) continue;
    p.tail_keys = (float*)take(tail_floats * 4);
    ok = ok && p.tail_keys;
    p.tail_values = p.tail_keys + (size_t)c.pseudo * c.dim;
    p.tail_bias = p.tail_values + (size_t)c.pseudo * DP;
  }
  if (ok) {
#pragma omp parallel num_threads(c.threads)
    {
      Scratch w;
      Spread spread;
      w.q.resize((size_t)c.block_q * c.dim); w.s.resize((size_t)NEAR * BK); w.acc.resize((size_t)c.block_q * DP);
      w.m.resize(c.block_q); w.l.resize(c.block_q); w.bits.resize((size_t)c.block_q * ((c.block_k + 15) / 16));
      if (c.pseudo) {
        w.tail_rows.resize((size_t)BK * c.dim); w.tail_keys.resize((size_t)BK * c.dim); w.tail_values.resize((size_t)BK * DP); w.tail_bias.resize(BK);
        w.chosen.resize(c.pseudo);
      }
      std::vector<float> rows((size_t)BK * c.dim);
      if (c.pseudo) spread.resize(c.tail_parts * c.tail_lanes, c.dim);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < (int64_t)tiles.size(); t++) read_tile(tiles[t], c, t);
      for (int64_t start = 0; start < total; start += chunk) {
        const int64_t now = std::min(chunk, total - start);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < now * c.tiles_k; t++) {
          const int64_t z = start + t / c.tiles_k;
          const int b = (int)(z / c.kv_heads), kh = (int)(z % c.kv_heads), tile = (int)(t % c.tiles_k);
          pack_tile<T>(c, packed[t / c.tiles_k], rows, b, kh, tile);
          if (c.pseudo) stand_in<T>(c, packed[t / c.tiles_k], spread, b, kh, tile);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < now * group * c.tiles_q; t++) {
          const int64_t z = t / (group * (int64_t)c.tiles_q), pair = start + z;
          const int h = (int)(pair % c.kv_heads) * group + (int)(t / c.tiles_q % group);
          query_tile<T>(c, packed[z], tiles, w, (int)(pair / c.kv_heads), h, (int)(t % c.tiles_q));
        }
      }
    }
  }
  for (auto& p : packed) { free(p.keys); free(p.values); free(p.bias); free(p.holes); free(p.used); free(p.tail_keys); }
  return ok ? 0 : 1;
}

extern "C" int genattn_vector_lanes() { return VL; }

// fill in `bits` from the grid rules, for every entry that has a slot
extern "C" void genattn_evaluate_rules(const Call* call) {
  const Call& c = *call;
  const int BK = round_up(c.block_k, VL), words = (c.block_k + 15) / 16;
  std::vector<KeyTile> tiles((size_t)rule_count(c) * c.tiles_k);
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < (int64_t)tiles.size(); t++) read_tile(tiles[t], c, t);
#pragma omp for schedule(dynamic, 4)
    for (int64_t t = 0; t < (int64_t)c.heads * c.tiles_q; t++) {
      const int h = (int)(t / c.tiles_q), tile = (int)(t % c.tiles_q), rule = c.rule_of_head[h];
      const int32_t* ptr = c.row_ptr + (size_t)(c.lists == 1 ? 0 : h) * (c.tiles_q + 1) + tile;
      for (int64_t e = ptr[0]; e < ptr[1]; e++) {
        const int64_t slot = c.slots[(c.slot_rows == 1 ? 0 : h) * c.nnz + e];
        if (slot < 0) continue;
        rule_tile(c.bits + (size_t)slot * c.block_q * words, c.rules[rule], c.rules[rule].heads == 1 ? 0 : h,
                  c.query_tiles + (size_t)tile * c.block_q, tiles[(size_t)rule * c.tiles_k + c.columns[e]], c.block_q, words, BK);
      }
    }
  }
}

// fill in `spans` from `bits`
extern "C" void genattn_measure_spans(const Call* call, int64_t slots) {
  const int words = (call->block_k + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(call->threads)
  for (int64_t i = 0; i < slots; i++) {
    Span s = span_of(call->bits + (size_t)i * call->block_q * words, call->block_q, words);
    memcpy(call->spans + i * 4, &s, sizeof s);
  }
}

// 0 done, 1 out of memory, 2 unknown dtype
extern "C" int genattn_block_sparse_forward(const Call* call) {
  switch (call->dtype) {
    case 0: return run<F32>(*call);
    case 1: return run<BF16>(*call);
    case 2: return run<F16>(*call);
    default: return 2;
  }
}
