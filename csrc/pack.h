// Operands of the products of tile.h, laid out from rows wherever these lie; and memory to lay them out in.
#pragma once

#include "tile.h"

namespace {

// x[i][j] and x[j][i] change places, for 16 by 16 elements of 4 bytes.
INLINE void transpose16(u32x16 *x) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // b[i + c] holds column c of each four columns, of rows i to i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    __m512i even_low = _mm512_shuffle_i32x4(b[c], b[c + 4], 0x88), odd_low = _mm512_shuffle_i32x4(b[c], b[c + 4], 0xdd);
    __m512i even_high = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0x88);
    __m512i odd_high = _mm512_shuffle_i32x4(b[c + 8], b[c + 12], 0xdd);
    x[c] = (u32x16)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    x[c + 8] = (u32x16)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    x[c + 4] = (u32x16)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    x[c + 12] = (u32x16)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      uint32_t other = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = other;
    }
#endif
}

// to[k][lane] = rows[lane][k] for `lanes` (at most 64) rows of `depth` elements; lanes up to the next multiple of 16
// become 0.
template <class E>
static void pack_across(const E *const *rows, int64_t lanes, int64_t depth, E *to, int64_t ldt) {
  static_assert(sizeof(E) == 4, "an element has four bytes");
  for (int64_t lane = 0; lane < lanes; lane += 16)
    for (int64_t k = 0; k < depth; k += 16) {
      u32x16 x[16];
      int64_t used = min_of(16, lanes - lane), deep = min_of(16, depth - k);
      if (used == 16 && deep == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) memcpy(&x[i], rows[lane + i] + k, sizeof x[i]);
        transpose16(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) memcpy(to + (k + i) * ldt + lane, &x[i], sizeof x[i]);
        continue;
      }
      for (int i = 0; i < 16; i++) {
        x[i] = u32x16{};
        if (i < used) x[i] = (u32x16)load_n((const float *)(rows[lane + i] + k), deep);
      }
      transpose16(x);
      for (int64_t i = 0; i < deep; i++) memcpy(to + (k + i) * ldt + lane, &x[i], sizeof x[i]);
    }
}

// A length up to the next multiple of 16.
INLINE int64_t padded(int64_t length) { return ceil_div(length, 16) * 16; }

// to[k / 2][i] = (rows[k][i], rows[k + 1][i]) for `count` rows of bfloat16, with a row of zeros when that is odd;
// entries from `length` to `padded` (a multiple of 16) become 0.
static inline void interleave(const bf16 *const *rows, int64_t count, int64_t length, int64_t padded, const bf16 *zeros,
                              pair *to) {
  for (int64_t k = 0; k < count; k += 2, to += padded) {
    const bf16 *a = rows[k], *b = k + 1 < count ? rows[k + 1] : zeros;
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 16 <= length; i += 16) {
      __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(a + i)));
      __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(b + i)));
      _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#endif
    for (; i < length; i++) to[i].first = a[i].bits, to[i].second = b[i].bits;
    for (; i < padded; i++) to[i].first = to[i].second = 0;
  }
}

// A row as elements: where it lies if its memory already is that, else converted to `to`.
INLINE const float *as_elements(const float *row, int64_t, float *) { return row; }

INLINE const float *as_elements(const bf16 *row, int64_t length, float *to) {
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) store(to + i, load(row + i));
  for (; i < length; i++) to[i] = to_float(row[i]);
  return to;
}

INLINE const pair *as_elements(const bf16 *row, int64_t length, pair *to) {
  if (length % 2 == 0) return (const pair *)row;
  memcpy(to, row, length * sizeof(bf16));
  to[length / 2].second = 0;
  return to;
}

// Rows as the B of a product that is as deep as there are rows.
static inline void lay_down(const float *const *rows, int64_t count, int64_t length, const float *, float *to) {
  for (int64_t k = 0; k < count; k++, to += padded(length)) {
    memcpy(to, rows[k], length * sizeof(float));
    memset(to + length, 0, (padded(length) - length) * sizeof(float));
  }
}

static inline void lay_down(const bf16 *const *rows, int64_t count, int64_t length, const bf16 *zeros, pair *to) {
  interleave(rows, count, length, padded(length), zeros, to);
}

static inline void lay_down(const bf16 *const *rows, int64_t count, int64_t length, const bf16 *, float *to) {
  for (int64_t k = 0; k < count; k++, to += padded(length)) {
    for (int64_t i = 0; i < padded(length); i += 16)
      store(to + i, load_n(rows[k] + i, max_of(0, min_of(16, length - i))));
  }
}

// Memory handed out in 64-byte steps; without a base it only counts.
struct Arena {
  char *base;
  size_t used;
  template <class T>
  T *take(int64_t count) {
    size_t at = used;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return base ? (T *)(base + at) : 0;
  }
};

}  // namespace
