// Which keys of a visited tile a query sees: grid rules evaluated into bits.
#pragma once

#include <vector>

#include "call.h"
#include "vectors.h"

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
