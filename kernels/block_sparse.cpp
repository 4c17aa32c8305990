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
#ifdef __AVX512F__
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

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int vi __attribute__((vector_size(VL * 4)));
typedef int viu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef unsigned vu __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf x) { *(vfu*)p = x; }
static inline vi loadi(const int* p) { return *(const viu*)p; }
static inline vf splat(float x) { return vf{} + x; }
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
  const int32_t* slots;         // [mask_heads, nnz] row of `bits`, or null
  const uint16_t* bits;         // [unique, BQ, words] one bit per lane
  int64_t stride[4][3];         // query, key, value, out: batch, token, head (elements)
  int64_t nnz, workspace;       // bytes that packed keys and values may take
  int32_t batch, heads, kv_heads, dim, seqlen_q, seqlen_k, tiles_q, tiles_k, block_q, block_k, lists, mask_heads;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
  float scale;
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

// ---- 2^x; -inf and deep underflow give 0, NaN stays NaN

static inline vf exp2v(vf x) {
  const vf c6 = splat(1.5403530e-4f), c5 = splat(1.3333558e-3f), c4 = splat(9.6181291e-3f), c3 = splat(5.5504109e-2f),
           c2 = splat(2.4022651e-1f), c1 = splat(6.9314718e-1f), c0 = splat(1.0f);
#ifdef __AVX512F__
  x = (vf)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // NaN comes from the second operand
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, 0);
  vf f = x - whole;
  vf p = ((((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f + c1) * f + c0);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const vf floor_ = splat(-126.f), magic = splat(12582912.f);
  vf y = x < floor_ ? floor_ : x;
  vf t = y + magic, f = y - (t - magic);
  vi whole = (vi)t - (vi)magic;
  vf p = ((((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f + c1) * f + c0);
  vf r = (vf)((vi)p + (whole << 23));
  return x >= floor_ ? r : (x < floor_ ? vf{} : x);
#endif
}

static inline float max_of(vf v) { float m = v[0]; for (int j = 1; j < VL; j++) m = v[j] > m ? v[j] : m; return m; }
static inline float sum_of(vf v) { float s = 0; for (int j = 0; j < VL; j++) s += v[j]; return s; }

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

// B: columns cut into panels of NR, the last one narrower
template <bool ADD>
static void product(const float* A, int lda, const float* B, float* C, int ldc, int rows, int depth, int columns) {
  int at = 0;
  for (; at + NR <= columns; at += NR) panel<ADD, NV>(A, lda, B + (size_t)at * depth, C + at, ldc, rows, depth);
  const float* rest = B + (size_t)at * depth;
  switch ((columns - at) / VL) {
    case 1: panel<ADD, 1>(A, lda, rest, C + at, ldc, rows, depth); break;
    case 2: panel<ADD, 2>(A, lda, rest, C + at, ldc, rows, depth); break;
    case 3: panel<ADD, 3>(A, lda, rest, C + at, ldc, rows, depth); break;
    default: break;
  }
}

// ---- the element rule

struct KeyTile {  // coordinates of a key tile's lanes, and which frames it holds
  std::vector<int> t, y, x, y_rest, x_rest, frames;
};

static void read_tile(KeyTile& tile, const Rule& rule, const int32_t* lanes, int block, int padded) {
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

// visible lanes of one query row as 0 / -1
static void rule_row(int* seen, const Rule& r, int head, const int32_t* query, const KeyTile& tile, int padded) {
  const bool grid = query[0] >= 0;
  for (int j = 0; j < padded; j += VL) *(viu*)(seen + j) = grid ? loadi(&tile.t[j]) == -1 : loadi(&tile.t[j]) != -2;
  if (!grid) return;
  for (int frame : tile.frames) {
    int cls = r.frame_class[((size_t)head * r.frames + query[0]) * r.frames + frame];
    if (cls < 0) continue;
    Window wy = window_of(r, head, cls, 0, query[1]), wx = window_of(r, head, cls, 1, query[2]);
    for (int j = 0; j < padded; j += VL) {
      vi m = (loadi(&tile.t[j]) == frame) & inside(wy, loadi(&tile.y[j])) & inside(wx, loadi(&tile.x[j]));
      if (r.dilation[0] > 1) m &= loadi(&tile.y_rest[j]) == wy.rest;
      if (r.dilation[1] > 1) m &= loadi(&tile.x_rest[j]) == wx.rest;
      *(viu*)(seen + j) |= m;
    }
  }
}

static void bits_row(int* seen, const uint16_t* words, int padded) {
  const vi one = splati(1);
  vi lane;
  for (int j = 0; j < VL; j++) lane[j] = j;
  for (int j = 0; j < padded; j += VL) {
    int word = words[j / 16] >> (j % 16);
    *(viu*)(seen + j) = ((splati(word) >> lane) & one) != 0;
  }
}

// ---- one query tile

struct Scratch {
  std::vector<float> q, s, acc, m, l;
  std::vector<int> seen;
};

// online softmax of one row of scores; `bias` is null or 0 / -inf per lane, `seen` null or 0 / -1
static inline void softmax_row(float* s, int width, float& m, float& l, float* acc, int acc_width, const float* bias, const int* seen) {
  vf top = splat(-INFINITY);
  for (int j = 0; j < width; j += VL) {
    vf x = load(s + j);
    if (seen) x = loadi(seen + j) ? x : splat(-INFINITY);
    if (bias) x += load(bias + j);
    if (seen || bias) store(s + j, x);
    top = top > x ? top : x;
  }
  float high = max_of(top);
  high = high > m ? high : m;
  vf offset = splat(high == -INFINITY ? 0.f : high), sum = {};
  for (int j = 0; j < width; j += VL) {
    vf p = exp2v(load(s + j) - offset);
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

struct Packed {  // keys and values of one (batch, key head), tile after tile
  float *keys, *values, *bias;
  uint8_t* holes;
};

template <typename T>
static void query_tile(const Call& c, const Packed& kv, const std::vector<KeyTile>& tiles, Scratch& w, int b, int h, int tile) {
  const int D = c.dim, DP = round_up(D, VL), BQ = c.block_q, BK = round_up(c.block_k, VL);
  const int32_t* lanes = c.query_tiles + (size_t)tile * BQ;
  const int list = c.lists == 1 ? 0 : h;
  const float factor = c.scale * 1.4426950408889634f;
  for (int i = 0; i < BQ; i++) {
    float* row = &w.q[(size_t)i * D];
    if (lanes[i] < 0) { std::fill(row, row + D, 0.f); continue; }
    const T* src = (const T*)c.query + b * c.stride[0][0] + lanes[i] * c.stride[0][1] + h * c.stride[0][2];
    for (int d = 0; d < D; d++) row[d] = src[d].get() * factor;
  }
  std::fill(w.acc.begin(), w.acc.end(), 0.f);
  std::fill(w.m.begin(), w.m.end(), -INFINITY);
  std::fill(w.l.begin(), w.l.end(), 0.f);
  const int64_t first = c.row_ptr[(size_t)list * (c.tiles_q + 1) + tile], last = c.row_ptr[(size_t)list * (c.tiles_q + 1) + tile + 1];
  const int64_t ragged = first + c.num_full[(size_t)list * c.tiles_q + tile];
  const Rule* rule = c.rules ? c.rules + c.rule_of_head[h] : nullptr;
  const size_t words = (c.block_k + 15) / 16;
  for (int64_t e = first; e < last; e++) {
    const int kt = c.columns[e];
    const float* bias = kv.holes[kt] ? kv.bias + (size_t)kt * BK : nullptr;
    const bool partial = e >= ragged;
    const uint16_t* bits = partial && c.slots ? c.bits + (size_t)c.slots[(c.mask_heads == 1 ? 0 : h) * c.nnz + e] * BQ * words : nullptr;
    product<false>(w.q.data(), D, kv.keys + (size_t)kt * BK * D, w.s.data(), BK, BQ, D, BK);
    for (int i = 0; i < BQ; i++) {
      int* seen = nullptr;
      if (partial && lanes[i] >= 0) {
        seen = w.seen.data();
        if (rule) rule_row(seen, *rule, rule->heads == 1 ? 0 : h, rule->coords + (size_t)lanes[i] * 3, tiles[(size_t)c.rule_of_head[h] * c.tiles_k + kt], BK);
        else bits_row(seen, bits + i * words, BK);
      }
      softmax_row(&w.s[(size_t)i * BK], BK, w.m[i], w.l[i], &w.acc[(size_t)i * DP], DP, bias, seen);
    }
    product<true>(w.s.data(), BK, kv.values + (size_t)kt * BK * DP, w.acc.data(), DP, BQ, BK, DP);
  }
  for (int i = 0; i < BQ; i++) {
    if (lanes[i] < 0) continue;
    const float l = w.l[i], inverse = l == 0.f ? 0.f : 1.f / l;
    T* dst = (T*)c.out + b * c.stride[3][0] + lanes[i] * c.stride[3][1] + h * c.stride[3][2];
    for (int d = 0; d < D; d++) dst[d].set(w.acc[(size_t)i * DP + d] * inverse);
    c.lse[((size_t)b * c.seqlen_q + lanes[i]) * c.heads + h] = l == 0.f ? -INFINITY : (w.m[i] + log2f(l)) * 0.69314718055994531f;
  }
}

// gather one key tile: K transposed into panels of keys, V into panels of channels; hidden lanes are zero with bias -inf
template <typename T>
static void pack_tile(const Call& c, const Packed& kv, std::vector<float>& rows, int b, int kh, int kt) {
  const int D = c.dim, DP = round_up(D, VL), BK = round_up(c.block_k, VL);
  const int32_t* lanes = c.key_tiles + (size_t)kt * c.block_k;
  float *keys = kv.keys + (size_t)kt * BK * D, *values = kv.values + (size_t)kt * BK * DP, *bias = kv.bias + (size_t)kt * BK;
  kv.holes[kt] = 0;
  for (int i = 0; i < BK; i++) {
    bool used = i < c.block_k && lanes[i] >= 0 && (!c.key_mask || c.key_mask[(size_t)b * c.seqlen_k + lanes[i]]);
    bias[i] = used ? 0.f : -INFINITY;
    if (!used) kv.holes[kt] = 1;
    const T* k = used ? (const T*)c.key + b * c.stride[1][0] + lanes[i] * c.stride[1][1] + kh * c.stride[1][2] : nullptr;
    for (int d = 0; d < D; d++) rows[(size_t)i * D + d] = used ? k[d].get() : 0.f;
  }
  for (int at = 0; at < BK; at += NR) {
    const int width = std::min(NR, BK - at);
    float* dst = keys + (size_t)at * D;
    for (int n0 = 0; n0 < width; n0 += VL)  // short runs keep the transposing reads in cache
      for (int d = 0; d < D; d++)
        for (int n = n0; n < n0 + VL; n++) dst[(size_t)d * width + n] = rows[(size_t)(at + n) * D + d];
  }
  for (int i = 0; i < BK; i++) {
    const T* v = bias[i] == 0.f ? (const T*)c.value + b * c.stride[2][0] + lanes[i] * c.stride[2][1] + kh * c.stride[2][2] : nullptr;
    for (int at = 0; at < DP; at += NR) {
      const int width = std::min(NR, DP - at);
      float* dst = values + (size_t)at * BK + (size_t)i * width;
      for (int d = 0; d < width; d++) dst[d] = v && at + d < D ? v[at + d].get() : 0.f;
    }
  }
}

static void* take(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

template <typename T>
static int run(const Call& c) {
  const int DP = round_up(c.dim, VL), BK = round_up(c.block_k, VL), group = c.heads / c.kv_heads;
  const size_t key_floats = (size_t)c.tiles_k * BK * c.dim, value_floats = (size_t)c.tiles_k * BK * DP, lane_floats = (size_t)c.tiles_k * BK;
  const int64_t total = (int64_t)c.batch * c.kv_heads;
  const int64_t fit = std::max<int64_t>(1, c.workspace / (int64_t)((key_floats + value_floats + lane_floats) * 4));
  const int64_t chunk = std::min(total, fit);
  const int rules = c.rules ? 1 + *std::max_element(c.rule_of_head, c.rule_of_head + c.heads) : 0;
  std::vector<KeyTile> tiles((size_t)rules * c.tiles_k);
  std::vector<Packed> packed(chunk);
  bool ok = true;
  for (auto& p : packed) {
    p = {(float*)take(key_floats * 4), (float*)take(value_floats * 4), (float*)take(lane_floats * 4), (uint8_t*)take(c.tiles_k)};
    ok = ok && p.keys && p.values && p.bias && p.holes;
  }
  if (ok) {
#pragma omp parallel num_threads(c.threads)
    {
      Scratch w;
      w.q.resize((size_t)c.block_q * c.dim); w.s.resize((size_t)c.block_q * BK); w.acc.resize((size_t)c.block_q * DP);
      w.m.resize(c.block_q); w.l.resize(c.block_q); w.seen.resize(BK);
      std::vector<float> rows((size_t)BK * c.dim);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < (int64_t)tiles.size(); t++)
        read_tile(tiles[t], c.rules[t / c.tiles_k], c.key_tiles + (size_t)(t % c.tiles_k) * c.block_k, c.block_k, BK);
      for (int64_t start = 0; start < total; start += chunk) {
        const int64_t now = std::min(chunk, total - start);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < now * c.tiles_k; t++) {
          const int64_t z = start + t / c.tiles_k;
          pack_tile<T>(c, packed[t / c.tiles_k], rows, (int)(z / c.kv_heads), (int)(z % c.kv_heads), (int)(t % c.tiles_k));
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
  for (auto& p : packed) { free(p.keys); free(p.values); free(p.bias); free(p.holes); }
  return ok ? 0 : 1;
}

extern "C" int genattn_vector_lanes() { return VL; }

// 0 done, 1 out of memory, 2 unknown dtype
extern "C" int genattn_block_sparse_forward(const Call* call) {
  switch (call->dtype) {
    case 0: return run<F32>(*call);
    case 1: return run<BF16>(*call);
    case 2: return run<F16>(*call);
    default: return 2;
  }
}
