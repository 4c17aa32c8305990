// Block-sparse attention forward on the CPU: flash-style online softmax over listed key tiles, fp32 arithmetic.
//
// Per (batch, key head) the key tiles are gathered by token index and packed once: K transposed, both in column panels as wide
// as the micro-kernel. Then query tiles are dealt to threads. Vector code is GCC/Clang vector extensions; the width is fixed at
// compile time by the target. Plain C interface, no torch headers.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 6, NV = 4;
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6, NV = 2;
#elif defined(__aarch64__)
constexpr int VL = 4, MR = 6, NV = 4;
#else
constexpr int VL = 4, MR = 4, NV = 2;
#endif
constexpr int NR = VL * NV;
constexpr int NEAR = 4 * MR;  // query rows whose scores of one tile stay in the nearest cache

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int vi __attribute__((vector_size(VL * 4)));
typedef int viu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef unsigned vu __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf x) { *(vfu*)p = x; }
static inline vi loadi(const int* p) { return *(const viu*)p; }
static inline vf splat(float x) { return x - vf{}; }  // x - 0 folds to a bare broadcast, 0 + x does not
static inline vi splati(int x) { return vi{} + x; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

struct Rule {  // mirrors GridRule
  const int32_t *coords, *frame_class, *low, *width;
  int32_t heads, frames, classes, longest;
  int32_t extent[2], dilation[2], circular[2];
};

struct Call {
  const void *query, *key, *value;
  void* out;
  float* lse;               // [B, Sq, H]
  const uint8_t* key_mask;  // [B, Sk] or null
  const int32_t *query_tiles, *key_tiles, *row_ptr, *columns, *num_full;
  const Rule* rules;            // or null
  const int32_t* rule_of_head;  // [heads] index into rules
  const int32_t* slots;         // [slot_rows, nnz], rows 1 or heads: index into bits and spans, -1 for full tiles; or null
  uint16_t* bits;               // [slots, BQ, words] one bit per lane
  int16_t* spans;               // [slots, 4] see Span
  const int32_t* tail_tokens;   // [pseudo, tail_lanes] what the pseudo-keys of a tile are means of, -1 unused; or null
  const int32_t* tail_skipped;  // [lists, tiles_q, ceil(tiles_k / 32)] one bit per key tile
  const uint8_t* tail_counted;  // [Sk] which tokens weigh, or null for all
  const int32_t* fade_window;   // [tiles_q, 2] first and last place inside, or null
  const int32_t* fade_span;     // [tiles_k, 2] first and last place of a key tile
  int64_t stride[4][3];         // query, key, value, out: batch, token, head (elements)
  int64_t nnz, workspace;       // bytes that packed keys and values may take
  int32_t batch, heads, kv_heads, dim, seqlen_q, seqlen_k, tiles_q, tiles_k, block_q, block_k, lists, slot_rows;
  int32_t pseudo, tail_lanes, tail_parts;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
  float scale;
  float fade_factor, fade_penalty;  // of logits outside: above 0, and in nats
};

// ---- number formats

static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

struct F32 { float x; float get() const { return x; } void set(float f) { x = f; } };
struct BF16 {
  uint16_t x;
  float get() const { return from_bits((uint32_t)x << 16); }
  void set(float f) {
    uint32_t u = to_bits(f);
    x = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};
struct F16 {
  uint16_t x;
  float get() const {
    uint32_t mag = x & 0x7fff, sign = (uint32_t)(x & 0x8000) << 16;
    uint32_t u = mag >= 0x7c00 ? 0x7f800000u | (mag << 13) : to_bits(from_bits(mag << 13) * 0x1p112f);
    return from_bits(u | sign);
  }
  void set(float f) {
    uint32_t u = to_bits(f), sign = u & 0x80000000u, o;
    u ^= sign;
    const uint32_t magic = ((127 - 15) + (23 - 10) + 1) << 23;
    if (u >= (127u + 16) << 23) o = u > 0x7f800000u ? 0x7e00 : 0x7c00;
    else if (u < 113u << 23) o = to_bits(from_bits(u) + from_bits(magic)) - magic;
    else o = (u + ((uint32_t)(15 - 127) << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    x = (uint16_t)(o | (sign >> 16));
  }
};

// ---- across lanes

#if defined(__AVX512F__)
static inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float max_of(vf v) { return _mm512_reduce_max_ps((__m512)v); }
static inline float sum_of(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX__)
static inline vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline float max_of(vf v) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
static inline float sum_of(vf v) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
#else
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline float max_of(vf v) { float m = v[0]; for (int j = 1; j < VL; j++) m = v[j] > m ? v[j] : m; return m; }
static inline float sum_of(vf v) { float s = 0; for (int j = 0; j < VL; j++) s += v[j]; return s; }
#endif

// ---- 2^x; -inf and deep underflow give 0, NaN stays NaN

static inline vf exp2v(vf x) {
  // minimax on [-0.5, 0.5], relative error 9e-8
  const vf c5 = splat(1.32646971e-3f), c4 = splat(9.67151101e-3f), c3 = splat(5.55073404e-2f), c2 = splat(2.40222426e-1f),
           c1 = splat(6.93146980e-1f), c0 = splat(1.0f);
#ifdef __AVX512F__
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, 0);
  vf f = x - whole;
  vf p = (((((c5 * f + c4) * f + c3) * f + c2) * f + c1) * f + c0);
  // lanes below the normal range are zeroed, not scaled: an underflow costs hundreds of cycles. NaN is "not less than"
  __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
#else
  const vf floor_ = splat(-126.f), magic = splat(12582912.f);
  vf y = larger(floor_, x);  // in this order NaN stays
  vf t = y + magic, f = y - (t - magic);
  vf p = (((((c5 * f + c4) * f + c3) * f + c2) * f + c1) * f + c0);
  vf scale = (vf)(((vi)t - (vi)magic + 127) << 23);
  return (vf)((vi)(p * scale) & ~(vi)(x < floor_));
#endif
}

// ---- matrix product: C[rows, W*VL] (+)= A[rows, depth] * B[depth, W*VL], B packed as one panel

template <bool ADD, int M, int W>
static inline __attribute__((always_inline)) void micro(const float* A, int lda, const float* B, float* C, int ldc, int depth) {
  vf c[M][W];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) c[i][j] = ADD ? load(C + i * ldc + VL * j) : vf{};
  for (int k = 0; k < depth; k++, B += W * VL) {
    vf b[W];
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) b[j] = load(B + VL * j);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf a = splat(A[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < W; j++) c[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < W; j++) store(C + i * ldc + VL * j, c[i][j]);
}

template <bool ADD, int W>
static void panel(const float* A, int lda, const float* B, float* C, int ldc, int rows, int depth) {
  int i = 0;
  for (; i + MR <= rows; i += MR) micro<ADD, MR, W>(A + i * lda, lda, B, C + i * ldc, ldc, depth);
  for (; i + 2 <= rows; i += 2) micro<ADD, 2, W>(A + i * lda, lda, B, C + i * ldc, ldc, depth);
  for (; i < rows; i++) micro<ADD, 1, W>(A + i * lda, lda, B, C + i * ldc, ldc, depth);
}

// B: `columns` cut into panels of NR, the last one narrower, each `full_depth` deep and used from its row `skip`; only panels
// that meet [from, to) are computed
template <bool ADD>
static void product(const float* A, int lda, const float* B, float* C, int ldc, int rows, int depth, int columns, int full_depth, int skip,
                    int from, int to) {
  int at = from / NR * NR;
  for (; at + NR <= columns && at < to; at += NR)
    panel<ADD, NV>(A, lda, B + (size_t)at * full_depth + (size_t)skip * NR, C + at, ldc, rows, depth);
  if (at >= to) return;
  const float* rest = B + (size_t)at * full_depth + (size_t)skip * (columns - at);
  switch ((columns - at) / VL) {
    case 1: panel<ADD, 1>(A, lda, rest, C + at, ldc, rows, depth); break;
    case 2: panel<ADD, 2>(A, lda, rest, C + at, ldc, rows, depth); break;
    case 3: panel<ADD, 3>(A, lda, rest, C + at, ldc, rows, depth); break;
    default: break;
  }
}

// to[d, n] = from[n, d] for n below VL, rows `lda` and `ldt` apart
static inline void transpose_strip(const float* from, int lda, float* to, int ldt, int depth) {
  int d = 0;
#ifdef __AVX__
  for (; d + 8 <= depth; d += 8)
    for (int n = 0; n < VL; n += 8) {
      const float* a = from + (size_t)n * lda + d;
      __m256 r[8], u[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(a + (size_t)i * lda);
      for (int i = 0; i < 8; i += 2) u[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), u[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
          r[i + 2 * j] = _mm256_shuffle_ps(u[i + j], u[i + j + 2], 0x44);
          r[i + 2 * j + 1] = _mm256_shuffle_ps(u[i + j], u[i + j + 2], 0xee);
        }
      for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + (size_t)(d + i) * ldt + n, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (size_t)(d + i + 4) * ldt + n, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
      }
    }
#endif
  for (; d < depth; d++)
    for (int n = 0; n < VL; n++) to[(size_t)d * ldt + n] = from[(size_t)n * lda + d];
}

// rows [lanes, depth] as columns, in panels of NR, the last one narrower; lanes in whole vectors
static void as_panels(const float* rows, float* panels, int lanes, int depth) {
  for (int at = 0; at < lanes; at += NR) {
    const int width = std::min(NR, lanes - at);
    for (int n = 0; n < width; n += VL) transpose_strip(rows + (size_t)(at + n) * depth, depth, panels + (size_t)at * depth + n, width, depth);
  }
}

// ---- the element rule

struct KeyTile {  // coordinates of a key tile's lanes, and which frames it holds
  std::vector<int> t, y, x, y_rest, x_rest, frames;
};

static int rule_count(const Call& c) { return 1 + *std::max_element(c.rule_of_head, c.rule_of_head + c.heads); }

static void read_tile(KeyTile& tile, const Call& c, int64_t index) {  // index: rule * tiles_k + key tile
  const Rule& rule = c.rules[index / c.tiles_k];
  const int block = c.block_k, padded = round_up(block, VL);
  const int32_t* lanes = c.key_tiles + (size_t)(index % c.tiles_k) * block;
  for (auto* v : {&tile.t, &tile.y, &tile.x, &tile.y_rest, &tile.x_rest}) v->assign(padded, 0);
  tile.frames.clear();
  for (int i = 0; i < padded; i++) {
    if (i >= block || lanes[i] < 0) { tile.t[i] = -2; continue; }
    const int32_t* c = rule.coords + (size_t)lanes[i] * 3;
    tile.t[i] = c[0]; tile.y[i] = c[1]; tile.x[i] = c[2];
    tile.y_rest[i] = c[1] % rule.dilation[0]; tile.x_rest[i] = c[2] % rule.dilation[1];
    if (c[0] >= 0 && std::find(tile.frames.begin(), tile.frames.end(), c[0]) == tile.frames.end()) tile.frames.push_back(c[0]);
  }
}

struct Window { int low, width, extent, rest; bool circular; };

static inline Window window_of(const Rule& r, int head, int cls, int axis, int at) {
  size_t i = (((size_t)head * r.classes + cls) * 2 + axis) * r.longest + at;
  Window w{r.low[i], std::max(0, r.width[i]), r.extent[axis], at % r.dilation[axis], r.circular[axis] != 0};
  if (w.circular) w.low = ((w.low % w.extent) + w.extent) % w.extent;
  return w;
}

static inline vi inside(const Window& w, vi at) {
  vi ahead = at - w.low;
  if (w.circular) ahead = ahead < 0 ? ahead + w.extent : ahead;
  return (vi)((vu)ahead < (vu)splati(w.width));
}

static inline unsigned bits_of(vi m) {  // one bit per lane of a comparison
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m);
#elif defined(__AVX__)
  return (unsigned)_mm256_movemask_ps((__m256)m);
#else
  unsigned u = 0;
  for (int j = 0; j < VL; j++) u |= (unsigned)(m[j] & 1) << j;
  return u;
#endif
}

// visible lanes of one query row, one bit each; words must be zero before
static void rule_row(uint16_t* words, const Rule& r, int head, const int32_t* query, const KeyTile& tile, int padded) {
  const bool grid = query[0] >= 0;
  for (int j = 0; j < padded; j += VL)
    words[j / 16] |= bits_of(grid ? (vi)(loadi(&tile.t[j]) == -1) : (vi)(loadi(&tile.t[j]) != -2)) << (j % 16);
  if (!grid) return;
  for (int frame : tile.frames) {
    int cls = r.frame_class[((size_t)head * r.frames + query[0]) * r.frames + frame];
    if (cls < 0) continue;
    Window wy = window_of(r, head, cls, 0, query[1]), wx = window_of(r, head, cls, 1, query[2]);
    for (int j = 0; j < padded; j += VL) {
      vi m = (loadi(&tile.t[j]) == frame) & inside(wy, loadi(&tile.y[j])) & inside(wx, loadi(&tile.x[j]));
      if (r.dilation[0] > 1) m &= loadi(&tile.y_rest[j]) == wy.rest;
      if (r.dilation[1] > 1) m &= loadi(&tile.x_rest[j]) == wx.rest;
      words[j / 16] |= bits_of(m) << (j % 16);
    }
  }
}

// the part of a tile pair in which anything is visible: query lanes [top, bottom), key lanes [left, right) in whole vectors
struct Span { int16_t left, right, top, bottom; };

static Span span_of(const uint16_t* bits, int rows, int words) {
  Span s{INT16_MAX, 0, INT16_MAX, 0};
  for (int i = 0; i < rows; i++)
    for (int w = 0; w < words; w++)
      if (unsigned u = bits[(size_t)i * words + w]) {
        s.left = std::min<int>(s.left, w * 16 + __builtin_ctz(u));
        s.right = std::max<int>(s.right, w * 16 + 32 - __builtin_clz(u));
        s.top = std::min<int>(s.top, i);
        s.bottom = i + 1;
      }
  if (!s.right) return {0, 0, 0, 0};
  s.left = s.left / VL * VL;
  s.right = round_up(s.right, VL);
  return s;
}

static Span rule_tile(uint16_t* bits, const Rule& r, int head, const int32_t* lanes, const KeyTile& tile, int rows, int words, int padded) {
  memset(bits, 0, (size_t)rows * words * 2);
  for (int i = 0; i < rows; i++)
    if (lanes[i] >= 0) rule_row(bits + (size_t)i * words, r, head, r.coords + (size_t)lanes[i] * 3, tile, padded);
  return span_of(bits, rows, words);
}

static inline vf hide(vf x, const uint16_t* words, int at) {  // -inf where the bit is not set
  const vf hidden = splat(-INFINITY);
#if defined(__AVX512F__)
  return (vf)_mm512_mask_mov_ps((__m512)hidden, words[at / 16], (__m512)x);
#else
  vi bit;
  for (int j = 0; j < VL; j++) bit[j] = 1 << j;
  return ((splati(words[at / 16] >> (at % 16)) & bit) != 0) ? x : hidden;
#endif
}

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

struct Packed {  // keys and values of one (batch, key head), tile after tile
  float *keys, *values, *bias;
  uint8_t* holes;
  int16_t* used;  // lanes up to the last one in use, in whole vectors
  float *tail_keys, *tail_values, *tail_bias;  // pseudo-keys, a row each; bias is log2 of the count
};

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

// n numbers of any format as floats; null stands for zeros
template <typename T>
static inline void as_floats(const T* __restrict from, float* __restrict to, int n) {
  if (!from) { memset(to, 0, (size_t)n * 4); return; }
  for (int d = 0; d < n; d++) to[d] = from[d].get();
}

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

// ---- what stands in for a tile: parts by likeness, as kernels/reference/likeness.py defines them, in double, so that all
// backends cut alike; then the mean key and mean value of each

constexpr int DL = VL / 2, AT_ONCE = 4;
typedef double vd __attribute__((vector_size(DL * 8)));
typedef double vdu __attribute__((vector_size(DL * 8), aligned(8), may_alias));

static inline vd loadd(const double* p) { return *(const vdu*)p; }

static inline double sum_of(vd x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)x);
#elif defined(__AVX__)
  __m128d h = _mm_add_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
#else
  double total = 0;
  for (int i = 0; i < DL; i++) total += x[i];
  return total;
#endif
}

struct Spread {  // rows of one tile, `width` numbers each, whole groups of AT_ONCE rows; what is not a key is zero
  std::vector<double> rows, mean, direction, place;
  std::vector<float> values, narrow;
  std::vector<int64_t> rank;
  std::vector<int32_t> tokens, order;
  int width, value_width;
  void resize(int lanes, int dim) {
    const int most = round_up(lanes, std::max(DL, AT_ONCE));
    width = round_up(dim, DL * AT_ONCE);
    value_width = round_up(dim, VL * AT_ONCE);
    rows.resize((size_t)most * width);
    values.resize((size_t)most * value_width);
    mean.resize(width); direction.resize(width); place.resize(most); rank.resize(most); order.resize(most); tokens.resize(most);
    narrow.resize(std::max(width, value_width));
  }
};

// place[i] = |row i - along|^2 (SQUARE) or row i . along; several rows at once hide the latency
template <bool SQUARE>
static void project(Spread& w, int n, const double* along) {
  for (int i = 0; i < n; i += AT_ONCE) {
    const double* row = &w.rows[(size_t)i * w.width];
    vd sum[AT_ONCE] = {};
    for (int d = 0; d < w.width; d += DL) {
      const vd other = loadd(along + d);
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) {
        const vd x = loadd(row + (size_t)j * w.width + d), away = x - other;
        sum[j] += SQUARE ? away * away : x * other;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < AT_ONCE; j++) w.place[i + j] = sum_of(sum[j]);
  }
}

// to = sum of factor[i] * row i
static void combine(const Spread& w, int n, const double* factor, double* to) {
  for (int d = 0; d < w.width; d += DL * AT_ONCE) {
    vd sum[AT_ONCE] = {};
    for (int i = 0; i < n; i++) {
      const double* row = &w.rows[(size_t)i * w.width + d];
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) sum[j] += loadd(row + j * DL) * factor[i];
    }
#pragma GCC unroll 4
    for (int j = 0; j < AT_ONCE; j++) *(vdu*)(to + d + j * DL) = sum[j];
  }
}

static void to_length_one(double* x, int n) {
  double length = 0;
  for (int d = 0; d < n; d++) length += x[d] * x[d];
  length = std::max(std::sqrt(length), 1e-20);
  for (int d = 0; d < n; d++) x[d] /= length;
}

// the coordinate along the first principal component, a constant apart, of each of the first n rows into place
static void along_the_spread(Spread& w, int n) {
  double *mean = w.mean.data(), *direction = w.direction.data(), *place = w.place.data();
  std::fill(place, place + n, 1. / n);
  combine(w, n, place, mean);
  project<true>(w, n, mean);
  const int farthest = (int)(std::max_element(place, place + n) - place);
  for (int d = 0; d < w.width; d++) direction[d] = w.rows[(size_t)farthest * w.width + d] - mean[d];
  to_length_one(direction, w.width);
  auto centred = [&] {
    double offset = 0;
    for (int d = 0; d < w.width; d++) offset += mean[d] * direction[d];
    project<false>(w, n, direction);
    for (int i = 0; i < n; i++) place[i] -= offset;
  };
  centred();
  double total = 0;
  for (int i = 0; i < n; i++) total += place[i];
  combine(w, n, place, direction);
  for (int d = 0; d < w.width; d++) direction[d] -= total * mean[d];
  to_length_one(direction, w.width);
  centred();
}

// rows in the order of their places: floats that compare like integers, equal ones by their lane, NaN last of all. How many
// are less says where each belongs: without a branch that cannot be foreseen
static void sort_by_place(Spread& w, int n) {
  const int whole = round_up(n, DL);
  for (int i = 0; i < whole; i++) {
    const float place = i < n ? (float)w.place[i] : INFINITY;
    const float clear = place != place ? FLT_MAX : std::min(std::max(place, -FLT_MAX), FLT_MAX) + 0.f;
    const uint32_t u = to_bits(clear);
    const int32_t sign = (int32_t)(u & 0x80000000u ? ~u : u | 0x80000000u) ^ INT32_MIN;
    w.rank[i] = i < n ? ((int64_t)sign * 65536 + i) : INT64_MAX;
  }
  for (int i = 0; i < n; i++) {
    int64_t rank = 0;
    const int64_t own = w.rank[i];
    for (int j = 0; j < whole; j++) rank += w.rank[j] < own;
    w.order[rank] = i;
  }
}

// narrow = mean of some rows
static void mean_key(Spread& w, const int32_t* some, int n) {
  const double share = n ? 1. / n : 0.;
  for (int d = 0; d < w.width; d += DL * AT_ONCE) {
    vd sum[AT_ONCE] = {};
    for (int i = 0; i < n; i++) {
      const double* row = &w.rows[(size_t)some[i] * w.width + d];
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) sum[j] += loadd(row + j * DL);
    }
    for (int j = 0; j < AT_ONCE; j++)
      for (int i = 0; i < DL; i++) w.narrow[d + j * DL + i] = (float)(sum[j][i] * share);
  }
}

static void mean_value(Spread& w, const int32_t* some, int n) {
  const float share = n ? 1.f / n : 0.f;
  for (int d = 0; d < w.value_width; d += VL * AT_ONCE) {
    vf sum[AT_ONCE] = {};
    for (int i = 0; i < n; i++) {
      const float* row = &w.values[(size_t)some[i] * w.value_width + d];
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) sum[j] += load(row + j * VL);
    }
#pragma GCC unroll 4
    for (int j = 0; j < AT_ONCE; j++) store(&w.narrow[d + j * VL], sum[j] * share);
  }
}

// the keys of a tile that count, with their values; how many
template <typename T>
static int read_members(const Call& c, Spread& w, int b, int kh, int tile) {
  const int lanes = c.tail_parts * c.tail_lanes, D = c.dim;
  const int32_t* from = c.tail_tokens + (size_t)tile * lanes;
  int n = 0;
  for (int i = 0; i < lanes; i++) {
    const int32_t token = from[i];
    if (token < 0 || (c.key_mask && !c.key_mask[(size_t)b * c.seqlen_k + token])) continue;
    const T* __restrict key = (const T*)c.key + b * c.stride[1][0] + token * c.stride[1][1] + kh * c.stride[1][2];
    double* __restrict row = &w.rows[(size_t)n * w.width];
    for (int d = 0; d < D; d++) row[d] = key[d].get();
    as_floats((const T*)c.value + b * c.stride[2][0] + token * c.stride[2][1] + kh * c.stride[2][2], &w.values[(size_t)n * w.value_width], D);
    w.order[n] = n;
    w.tokens[n++] = token;
  }
  return n;
}

// mean key and mean value of each part of a tile into its row of the tail
template <typename T>
static void stand_in(const Call& c, const Packed& kv, Spread& w, int b, int kh, int of_tile) {
  const int D = c.dim, DP = round_up(D, VL), parts = c.tail_parts;
  const int n = read_members<T>(c, w, b, kh, of_tile);
  if (parts > 1 && n) {
    along_the_spread(w, n);
    sort_by_place(w, n);
  }
  for (int part = 0; part < parts; part++) {
    const int first = (part * n + parts - 1) / parts, members = ((part + 1) * n + parts - 1) / parts - first;
    const int32_t* some = &w.order[first];
    const int lane = of_tile * parts + part;
    int counted = 0;
    for (int i = 0; i < members; i++) counted += !c.tail_counted || c.tail_counted[w.tokens[some[i]]];
    kv.tail_bias[lane] = counted ? log2f((float)counted) : -INFINITY;
    mean_key(w, some, members);
    memcpy(kv.tail_keys + (size_t)lane * D, w.narrow.data(), (size_t)D * 4);
    mean_value(w, some, members);
    memcpy(kv.tail_values + (size_t)lane * DP, w.narrow.data(), (size_t)D * 4);
    memset(kv.tail_values + (size_t)lane * DP + D, 0, (size_t)(DP - D) * 4);
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
