// What stands in for a tile: parts by likeness, as kernels/reference/likeness.py defines them, in double, so that all backends
// cut alike; then the mean key and mean value of each.
#pragma once

#include <cfloat>
#include <vector>

#include "call.h"
#include "vectors.h"

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
