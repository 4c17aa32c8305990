// Vectors of the target, number formats, and products of small matrices.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <algorithm>
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

// n numbers of any format as floats; null stands for zeros
template <typename T>
static inline void as_floats(const T* __restrict from, float* __restrict to, int n) {
  if (!from) { memset(to, 0, (size_t)n * 4); return; }
  for (int d = 0; d < n; d++) to[d] = from[d].get();
}
