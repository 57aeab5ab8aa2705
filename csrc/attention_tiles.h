// What the passes of sparse attention do with a tile: reading rows, finishing logits, writing rows.
#pragma once

#include "attention.h"

namespace {

// The bias of a tile and a panel, [key][lane]; 0 in lanes beyond the unit's rows.
static void take_bias(const Attention &p, const Unit &u, const Keys &keys, const Tile &t, int64_t panel, float *to) {
  int64_t rows = min_of(TILE, u.rows - panel * TILE);
  memset(to, 0, TILE * TILE * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    const int64_t *s = p.bias_strides, at = panel * TILE + r;
    const float *row = p.bias + u.b * s[0] + keys.row_head[at] * s[1] + keys.row_query[at] * s[2];
    for (int64_t k = 0; k < t.count; k++) to[k * TILE + r] = row[t.at[k]];
  }
}

// Pointers to the keys' or values' rows of a tile, `length` long; a key that nobody sees reads as zeros.
template <class T, class E>
static void take_rows(const void *data, const int64_t *strides, const Unit &u, const Tile &t, const uint64_t *seen,
                      int64_t length, E *converted, const T *zeros, const T **rows, const E **elements) {
  const T *base = (const T *)data + u.b * strides[0] + u.kv_head * strides[1];
  const int64_t width = in_elements<E>(length), step = strides[2], count = t.count;
  const int32_t *at = t.at;
  for (int64_t k = 0; k < count; k++) rows[k] = base + at[k] * step;
  if (seen)
    for (int64_t k = 0; k < count; k++)
      if (!seen[k]) rows[k] = zeros;
  for (int64_t k = 0; k < count; k++) elements[k] = as_elements(rows[k], length, converted + k * width);
}

// Rows of queries, or of something that lies as the output does, of one panel.
template <class T, class E>
static void take_panel(const void *data, const int64_t *strides, const Unit &u, const Keys &keys, int64_t panel,
                       int64_t length, E *converted, const T **rows, const E **elements) {
  const int64_t width = in_elements<E>(length), count = min_of(TILE, u.rows - panel * TILE);
  const int64_t head_step = strides[1], query_step = strides[2];
  const int32_t *head = keys.row_head + panel * TILE, *query = keys.row_query + panel * TILE;
  const T *base = (const T *)data + u.b * strides[0];
  for (int64_t i = 0; i < count; i++) {
    rows[i] = base + head[i] * head_step + query[i] * query_step;
    elements[i] = as_elements(rows[i], length, converted + i * width);
  }
}

// Rows rows[r] of `to`, `wide` long, from column r of a panel [wide][TILE], times factor[r].
template <class T>
NOINLINE void write_panel(const float *from, const float *factor, int64_t count, int64_t wide,
                          T *to, const int64_t *rows) {
  for (int64_t r = 0; r < count; r += 16) {
    const f32x16 times = load(factor + r);
    for (int64_t i = 0; i < wide; i += 16) {
      u32x16 x[16] = {};
      const int64_t used = min_of(16, wide - i), least = min_of(16, count - r);
      if (used == 16 && least == 16) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) x[j] = (u32x16)(load(from + (i + j) * TILE + r) * times);
        transpose16(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) store(to + rows[r + j] * wide + i, (f32x16)x[j]);
        continue;
      }
      for (int64_t j = 0; j < used; j++) x[j] = (u32x16)(load(from + (i + j) * TILE + r) * times);
      transpose16(x);
      for (int64_t j = 0; j < least; j++) store_n(to + rows[r + j] * wide + i, (f32x16)x[j], used);
    }
  }
}

// Scaled products [key][lane] become logits times log2(e): soft cap, bias, -inf where a lane does not see a key.
// `slope`, if given, becomes the soft cap's derivative.
static void finish_logits(const Attention &p, int64_t first, int64_t count, int64_t lane, int64_t lanes,
                          const float *bias, const Sight &sight, float *s, float *slope) {
  const float cap = (float)p.softcap, inner = 2 * LOG2E / cap;
  for (int64_t k = first; k < count; k++)
    for (int64_t i = lane; i < lanes; i += W) {
      float *at = s + k * TILE + i;
      vec x = vload(at);
      if (p.softcap != 0) {
        // tanh(y) = 1 - 2 / (e^(2y) + 1), without overflow
        vec y = x * inner;
        vec t = 1.0f - 2.0f / (exp2_of<true>((y > 126.0f) ? vec{} + 126.0f : y) + 1.0f);
        x = t * cap;
        if (slope) vstore(slope + k * TILE + i, 1.0f - t * t);
      }
      if (bias) x += vload(bias + k * TILE + i);
      if (p.softcap != 0 || bias) x *= LOG2E;
      vstore(at, sight.all ? x : choose(sight.bits[k] >> i, x, vec{} - __builtin_inff()));
    }
}

template <class T>
static float dot(const T *a, const T *b, int64_t length) {
  f32x16 sum = {};
  for (int64_t i = 0; i < length; i += 16) {
    int64_t n = min_of(16, length - i);
    sum += load_n(a + i, n) * load_n(b + i, n);
  }
  return hsum(sum);
}

}  // namespace
