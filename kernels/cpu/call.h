// What one call brings: its tensors, its plan, and the keys and values packed for it.
#pragma once

#include <cstdint>

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

struct Packed {  // keys and values of one (batch, key head), tile after tile
  float *keys, *values, *bias;
  uint8_t* holes;
  int16_t* used;  // lanes up to the last one in use, in whole vectors
  float *tail_keys, *tail_values, *tail_bias;  // pseudo-keys, a row each; bias is log2 of the count
};
