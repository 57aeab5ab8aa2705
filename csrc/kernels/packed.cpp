// Linears of up to 16 tokens with packed weights, unpacked in registers: one bit per entry (N:M and bitmask alike), or
// dense blocks in rows. Each output is summed in one order, whatever the number of threads.
#include "simd.h"

namespace {

// A unit: the entries that are put back in place at a time, and what multiplies them. X is the type of x in scratch.
template <typename E>
struct Unit;

// The first `count` of `room` entries, in the places that the mask names; 0 elsewhere. What is past them is not read.
template <typename E>
INLINE f32x16 spread(const E *p, uint32_t mask, int64_t room) {
  f32x16 w = {};
  for (int i = 0; mask && room > 0; mask &= mask - 1, room--) w[__builtin_ctz(mask)] = to_float(p[i++]);
  return w;
}

template <>
struct Unit<float> {
  typedef float X;
  typedef f32x16 W;
  static constexpr int WIDTH = 16;
#if defined(__AVX512F__)
  INLINE W inside(const float *p, uint32_t mask) {
    return (f32x16)_mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(p));
  }
#else
  INLINE W inside(const float *p, uint32_t mask) { return spread(p, mask, WIDTH); }
#endif
  INLINE W bounded(const float *p, uint32_t mask, int64_t room) { return spread(p, mask, room); }
  INLINE f32x16 fma(f32x16 sum, W w, const X *x) { return sum + w * load(x); }
  INLINE void put(float *p, W w, int64_t n) { store_n(p, w, n); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <>
struct Unit<bf16> {
  typedef bf16 X;
  typedef __m512i W;
  static constexpr int WIDTH = 32;
  INLINE W inside(const bf16 *p, uint32_t mask) { return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p)); }
  INLINE W bounded(const bf16 *p, uint32_t mask, int64_t room) {
    __mmask32 some = room >= 32 ? ~0u : room > 0 ? (1u << room) - 1 : 0;
    return _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(some, p));
  }
  INLINE f32x16 fma(f32x16 sum, W w, const X *x) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
  INLINE void put(bf16 *p, W w, int64_t n) { _mm512_mask_storeu_epi16(p, n >= 32 ? ~0u : (1u << n) - 1, w); }
};
#else
template <>
struct Unit<bf16> {
  typedef float X;
  typedef f32x16 W;
  static constexpr int WIDTH = 16;
#if defined(__AVX512F__)
  INLINE W inside(const bf16 *p, uint32_t mask) {
    return (f32x16)_mm512_maskz_expand_ps((__mmask16)mask, (__m512)load(p));
  }
#else
  INLINE W inside(const bf16 *p, uint32_t mask) { return spread(p, mask, WIDTH); }
#endif
  INLINE W bounded(const bf16 *p, uint32_t mask, int64_t room) { return spread(p, mask, room); }
  INLINE f32x16 fma(f32x16 sum, W w, const X *x) { return sum + w * load(x); }
  INLINE void put(bf16 *p, W w, int64_t n) { store_n(p, w, n); }
};
#endif

INLINE void assign(float *to, float x) { *to = x; }
INLINE void assign(float *to, bf16 x) { *to = to_float(x); }
INLINE void assign(bf16 *to, bf16 x) { *to = x; }

// Where the values of each row start; equally many in each where no offsets are given.
struct Rows {
  const int32_t *narrow;
  const int64_t *wide;
  int64_t per_row;
  INLINE int64_t start(const Rows &rows, int64_t r) {
    return rows.narrow ? rows.narrow[r] : rows.wide ? rows.wide[r] : r * rows.per_row;
  }
};

INLINE Rows rows_of(const void *offsets, int64_t is_wide, int64_t rows, int64_t total) {
  Rows found = {};
  if (offsets && is_wide)
    found.wide = (const int64_t *)offsets;
  else if (offsets)
    found.narrow = (const int32_t *)offsets;
  else
    found.per_row = rows ? total / rows : 0;
  return found;
}

template <int WIDTH>
INLINE uint32_t mask_at(const uint8_t *bits, int64_t unit) {
  if (WIDTH == 32) {
    uint32_t mask;
    memcpy(&mask, bits + unit * 4, 4);
    return mask;
  }
  uint16_t mask;
  memcpy(&mask, bits + unit * 2, 2);
  return mask;
}

// The bits of the last, short unit: n of them.
INLINE uint32_t last_mask(const uint8_t *bits, int64_t n) {
  uint32_t mask = 0;
  memcpy(&mask, bits, (n + 7) / 8);
  return mask & ((1u << n) - 1);
}

// sums[r][t] of N rows for T tokens. A row whose reads cannot leave the values whatever its bits is `inside`.
// Returns whether each row has as many bits as values.
template <int N, int T, bool INSIDE, typename E>
INLINE bool bit_rows(const E *values, int64_t total, const uint8_t *bits, int64_t bit_pitch, const Rows &starts,
                     int64_t row, const typename Unit<E>::X *x, int64_t pitch, int64_t cols, f32x16 (*sums)[T]) {
  constexpr int WIDTH = Unit<E>::WIDTH;
  int64_t at[N];
  for (int r = 0; r < N; r++) {
    at[r] = Rows::start(starts, row + r);
    for (int t = 0; t < T; t++) sums[r][t] = f32x16{};
  }
  bits += row * bit_pitch;
  int64_t units = cols / WIDTH, rest = cols % WIDTH;
  for (int64_t u = 0; u < units; u++) {
    for (int r = 0; r < N; r++) {
      uint32_t mask = mask_at<WIDTH>(bits + r * bit_pitch, u);
      const E *p = values + at[r];
      if (INSIDE) __builtin_prefetch((const char *)p + 1024, 0, 2);
      auto w = INSIDE ? Unit<E>::inside(p, mask) : Unit<E>::bounded(p, mask, total - at[r]);
      for (int t = 0; t < T; t++) sums[r][t] = Unit<E>::fma(sums[r][t], w, x + t * pitch + u * WIDTH);
      at[r] += __builtin_popcount(mask);
    }
  }
  bool fits = true;
  for (int r = 0; r < N; r++) {
    if (rest) {
      uint32_t mask = last_mask(bits + r * bit_pitch + units * WIDTH / 8, rest);
      auto w = Unit<E>::bounded(values + at[r], mask, total - at[r]);
      for (int t = 0; t < T; t++) sums[r][t] = Unit<E>::fma(sums[r][t], w, x + t * pitch + units * WIDTH);
      at[r] += __builtin_popcount(mask);
    }
    fits &= at[r] == Rows::start(starts, row + r + 1);
  }
  return fits;
}

// Whether rows [row, row + n) start within the values, in order.
INLINE bool in_order(const Rows &starts, int64_t row, int64_t n, int64_t total) {
  for (int64_t r = row; r < row + n; r++)
    if (Rows::start(starts, r) < 0 || Rows::start(starts, r + 1) < Rows::start(starts, r)) return false;
  return Rows::start(starts, row + n) <= total;
}

template <int T, typename E>
bool bits_linear(const E *x, const E *values, int64_t total, const uint8_t *bits, Rows starts, const E *bias, E *y,
                 int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  constexpr int N = T >= 16 ? 1 : T >= 8 ? 2 : 4;
  constexpr int WIDTH = Unit<E>::WIDTH;
  typedef typename Unit<E>::X X;
  int64_t pitch = ceil_div(cols, WIDTH) * WIDTH, bit_pitch = ceil_div(cols, 8);
  Scratch x_at(T * pitch * sizeof(X));
  X *xs = (X *)x_at.at;
  memset(xs, 0, T * pitch * sizeof(X));
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < cols; c++) assign(xs + t * pitch + c, x[t * cols + c]);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t group = 0; group < ceil_div(rows, N); group++) {
    int64_t row = group * N, n = min_of(N, rows - row);
    if (!in_order(starts, row, n, total)) {
      fits = false;
      continue;
    }
    f32x16 sums[N][T];
    if (n == N && Rows::start(starts, row + N - 1) + cols + WIDTH <= total)
      fits = bit_rows<N, T, true>(values, total, bits, bit_pitch, starts, row, xs, pitch, cols, sums) && fits;
    else
      for (int64_t r = 0; r < n; r++)
        fits = bit_rows<1, T, false>(values, total, bits, bit_pitch, starts, row + r, xs, pitch, cols, sums + r) && fits;
    for (int64_t r = 0; r < n; r++) {
      float b = bias ? to_float(bias[row + r]) : 0;
      for (int64_t t = 0; t < tokens; t++) from_float(y + t * rows + row + r, hsum(sums[r][t]) + b);
    }
  }
  return fits;
}

template <typename E>
bool bits_linear_for(const void *x, const void *values, int64_t total, const uint8_t *bits, Rows starts,
                     const void *bias, void *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  auto run = tokens <= 1   ? bits_linear<1, E>
             : tokens <= 2 ? bits_linear<2, E>
             : tokens <= 4 ? bits_linear<4, E>
             : tokens <= 8 ? bits_linear<8, E>
                           : bits_linear<16, E>;
  return run((const E *)x, (const E *)values, total, bits, starts, (const E *)bias, (E *)y, tokens, rows, cols, threads);
}

template <typename E>
bool unpack_bits(const E *values, int64_t total, const uint8_t *bits, Rows starts, E *out, int64_t cols, int64_t first,
                 int64_t last, int64_t threads) {
  constexpr int WIDTH = Unit<E>::WIDTH;
  int64_t bit_pitch = ceil_div(cols, 8);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t row = first; row < last; row++) {
    if (!in_order(starts, row, 1, total)) {
      fits = false;
      continue;
    }
    int64_t at = Rows::start(starts, row);
    bool inside = at + cols + WIDTH <= total;
    for (int64_t c = 0; c < cols; c += WIDTH) {
      int64_t n = min_of(WIDTH, cols - c);
      const uint8_t *here = bits + row * bit_pitch + c / 8;
      uint32_t mask = n == WIDTH ? mask_at<WIDTH>(here, 0) : last_mask(here, n);
      auto w = inside ? Unit<E>::inside(values + at, mask) : Unit<E>::bounded(values + at, mask, total - at);
      Unit<E>::put(out + (row - first) * cols + c, w, n);
      at += __builtin_popcount(mask);
    }
    fits = fits && at == Rows::start(starts, row + 1);
  }
  return fits;
}

// Block rows: sums[i][t] over the blocks of a row, in memory (level 1) between blocks.
template <int T, typename E>
bool blocks_linear(const E *x, const E *values, const int32_t *columns, int64_t num_blocks, const int32_t *offsets,
                   const E *bias, E *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc,
                   int64_t threads) {
  int64_t rows = block_rows * br;
  Scratch x_at((T * cols + LANES) * sizeof(float));
  float *xs = (float *)x_at.at;
  memset(xs, 0, T * cols * sizeof(float));
  for (int64_t i = 0; i < tokens * cols; i++) xs[i] = to_float(x[i]);
  bool fits = true;
#pragma omp parallel num_threads(threads) reduction(&& : fits)
  {
    Scratch sums_at(br * T * sizeof(f32x16));
    f32x16 *sums = (f32x16 *)sums_at.at;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < block_rows; row++) {
      memset((void *)sums, 0, br * T * sizeof(f32x16));
      int64_t from = offsets[row], to = offsets[row + 1];
      if (from < 0 || to < from || to > num_blocks) {
        fits = false;
        continue;
      }
      for (int64_t b = from; b < to; b++) {
        int64_t col = (int64_t)columns[b] * bc;
        if (col < 0 || col + bc > cols) {
          fits = false;
          continue;
        }
        const E *w = values + b * br * bc;
        for (int64_t i = 0; i < br; i++, w += bc) {
          f32x16 here[T];
          for (int t = 0; t < T; t++) here[t] = sums[i * T + t];
          int64_t c = 0;
          for (; c + LANES <= bc; c += LANES) {
            f32x16 part = load(w + c);
            for (int t = 0; t < T; t++) here[t] += part * load(xs + t * cols + col + c);
          }
          if (c < bc) {
            f32x16 part = load_n(w + c, bc - c);
            for (int t = 0; t < T; t++) here[t] += part * load_n(xs + t * cols + col + c, bc - c);
          }
          for (int t = 0; t < T; t++) sums[i * T + t] = here[t];
        }
      }
      for (int64_t i = 0; i < br; i++)
        for (int64_t t = 0; t < tokens; t++) {
          float b = bias ? to_float(bias[row * br + i]) : 0;
          from_float(y + t * rows + row * br + i, hsum(sums[i * T + t]) + b);
        }
    }
  }
  return fits;
}

template <typename E>
bool blocks_linear_for(const void *x, const void *values, const int32_t *columns, int64_t num_blocks,
                       const int32_t *offsets, const void *bias, void *y, int64_t tokens, int64_t block_rows,
                       int64_t cols, int64_t br, int64_t bc, int64_t threads) {
  auto run = tokens <= 1   ? blocks_linear<1, E>
             : tokens <= 2 ? blocks_linear<2, E>
             : tokens <= 4 ? blocks_linear<4, E>
             : tokens <= 8 ? blocks_linear<8, E>
                           : blocks_linear<16, E>;
  return run((const E *)x, (const E *)values, columns, num_blocks, offsets, (const E *)bias, (E *)y, tokens, block_rows,
             cols, br, bc, threads);
}

}  // namespace

// Returns 1 where a row has more or fewer bits than values, or its offsets do not ascend within the values.
PAUCITY_KERNEL(packed_bits)
(const void *x, const void *values, int64_t total, const uint8_t *bits, const void *offsets, int64_t wide_offsets,
 const void *bias, void *y, int64_t tokens, int64_t rows, int64_t cols, int64_t dtype, int64_t threads) {
  auto run = dtype == BF16 ? bits_linear_for<bf16> : bits_linear_for<float>;
  Rows starts = rows_of(offsets, wide_offsets, rows, total);
  return !run(x, values, total, bits, starts, bias, y, tokens, rows, cols, threads);
}

// Rows [first, last) of `rows`, dense; returns as packed_bits.
PAUCITY_KERNEL(unpack_bit_rows)
(const void *values, int64_t total, const uint8_t *bits, const void *offsets, int64_t wide_offsets, void *out,
 int64_t rows, int64_t cols, int64_t first, int64_t last, int64_t dtype, int64_t threads) {
  Rows starts = rows_of(offsets, wide_offsets, rows, total);
  if (dtype == BF16)
    return !unpack_bits((const bf16 *)values, total, bits, starts, (bf16 *)out, cols, first, last, threads);
  return !unpack_bits((const float *)values, total, bits, starts, (float *)out, cols, first, last, threads);
}

// Returns 1 where a block column or a row's offsets are out of range.
PAUCITY_KERNEL(packed_blocks)
(const void *x, const void *values, const int32_t *columns, int64_t num_blocks, const int32_t *offsets,
 const void *bias, void *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc, int64_t dtype,
 int64_t threads) {
  auto run = dtype == BF16 ? blocks_linear_for<bf16> : blocks_linear_for<float>;
  return !run(x, values, columns, num_blocks, offsets, bias, y, tokens, block_rows, cols, br, bc, threads);
}

// Block rows [first, last), dense; returns as packed_blocks. An entry has `size` bytes.
PAUCITY_KERNEL(unpack_block_rows)
(const char *values, const int32_t *columns, int64_t num_blocks, const int32_t *offsets, char *out, int64_t cols,
 int64_t br, int64_t bc, int64_t first, int64_t last, int64_t size, int64_t threads) {
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t row = first; row < last; row++) {
    char *here = out + (row - first) * br * cols * size;
    memset(here, 0, br * cols * size);
    int64_t from = offsets[row], to = offsets[row + 1];
    if (from < 0 || to < from || to > num_blocks) {
      fits = false;
      continue;
    }
    for (int64_t b = from; b < to; b++) {
      int64_t col = (int64_t)columns[b] * bc;
      if (col < 0 || col + bc > cols) {
        fits = false;
        continue;
      }
      for (int64_t i = 0; i < br; i++)
        memcpy(here + (i * cols + col) * size, values + (b * br + i) * bc * size, bc * size);
    }
  }
  return !fits;
}
