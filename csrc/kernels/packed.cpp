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
  __attribute__((always_inline)) int64_t start(int64_t r) const {
    return narrow ? narrow[r] : wide ? wide[r] : r * per_row;
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

// The sums of one row for T tokens. `inside`: no bits could make it read past the end of the values. One row at a time
// is one stream a thread, which memory serves best; several sums a token hide the latency of the additions.
// Returns whether the row has as many bits as values.
template <int T, bool INSIDE, typename E>
INLINE bool bit_row(const E *values, int64_t at, int64_t end, int64_t total, const uint8_t *bits,
                    const typename Unit<E>::X *x, int64_t pitch, int64_t cols, f32x16 *sums) {
  constexpr int WIDTH = Unit<E>::WIDTH, CHAINS = 2;
  constexpr int AHEAD = sizeof(E) == 4 ? 4096 : 0;  // measured; bfloat16 streams as well without
  f32x16 parts[CHAINS][T] = {};
  int64_t units = cols / WIDTH, rest = cols % WIDTH, u = 0;
  for (; u + CHAINS <= units; u += CHAINS)
    for (int chain = 0; chain < CHAINS; chain++) {
      uint32_t mask = mask_at<WIDTH>(bits, u + chain);
      if (INSIDE && AHEAD) __builtin_prefetch((const char *)(values + at) + AHEAD, 0, 2);
      auto w = INSIDE ? Unit<E>::inside(values + at, mask) : Unit<E>::bounded(values + at, mask, total - at);
      for (int t = 0; t < T; t++)
        parts[chain][t] = Unit<E>::fma(parts[chain][t], w, x + t * pitch + (u + chain) * WIDTH);
      at += __builtin_popcount(mask);
    }
  for (; u * WIDTH < cols; u++) {
    uint32_t mask = u < units ? mask_at<WIDTH>(bits, u) : last_mask(bits + u * WIDTH / 8, rest);
    auto w = Unit<E>::bounded(values + at, mask, total - at);
    for (int t = 0; t < T; t++) parts[0][t] = Unit<E>::fma(parts[0][t], w, x + t * pitch + u * WIDTH);
    at += __builtin_popcount(mask);
  }
  for (int t = 0; t < T; t++) {
    sums[t] = parts[0][t];
    for (int chain = 1; chain < CHAINS; chain++) sums[t] += parts[chain][t];
  }
  return at == end;
}

// Whether a row starts and ends within the values.
INLINE bool in_order(int64_t start, int64_t end, int64_t total) { return 0 <= start && start <= end && end <= total; }

template <int T, typename E>
bool bits_linear(const E *x, const E *values, int64_t total, const uint8_t *bits, Rows starts, const E *bias, E *y,
                 int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
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
  for (int64_t row = 0; row < rows; row++) {
    int64_t start = starts.start(row), end = starts.start(row + 1);
    if (!in_order(start, end, total)) {
      fits = false;
      continue;
    }
    f32x16 sums[T];
    const uint8_t *here = bits + row * bit_pitch;
    bool right = start + cols + WIDTH <= total
                     ? bit_row<T, true>(values, start, end, total, here, xs, pitch, cols, sums)
                     : bit_row<T, false>(values, start, end, total, here, xs, pitch, cols, sums);
    fits = fits && right;
    float b = bias ? to_float(bias[row]) : 0;
    for (int64_t t = 0; t < tokens; t++) from_float(y + t * rows + row, hsum(sums[t]) + b);
  }
  return fits;
}

// The same for more tokens: four rows are unpacked a stretch at a time and meet four tokens at a time, so that what is
// loaded is used four times. `sums` of the tokens stay in a level-1 cache between stretches.
template <typename E>
bool bits_many(const E *x, const E *values, int64_t total, const uint8_t *bits, Rows starts, const E *bias, E *y,
               int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  typedef Unit<E> U;
  typedef typename U::X X;
  constexpr int WIDTH = U::WIDTH, STRETCH = 16, N = 4, MOST = 16;
  int64_t units = ceil_div(cols, WIDTH), pitch = units * WIDTH, bit_pitch = ceil_div(cols, 8);
  Scratch x_at(MOST * pitch * sizeof(X));
  X *xs = (X *)x_at.at;
  memset(xs, 0, MOST * pitch * sizeof(X));
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < cols; c++) assign(xs + t * pitch + c, x[t * cols + c]);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t group = 0; group < ceil_div(rows, N); group++) {
    int64_t row = group * N, n = min_of(N, rows - row), at[N];
    bool right = true, inside = true;
    for (int64_t r = 0; r < n; r++) {
      at[r] = starts.start(row + r);
      right = right && in_order(at[r], starts.start(row + r + 1), total);
      inside = inside && at[r] + cols + WIDTH <= total;
    }
    if (!right) {
      fits = false;
      continue;
    }
    f32x16 sums[N][MOST] = {};
    typename U::W dense[N][STRETCH] = {};
    for (int64_t first = 0; first < units; first += STRETCH) {
      int64_t some = min_of(STRETCH, units - first);
      for (int64_t r = 0; r < n; r++)
        for (int64_t u = 0; u < some; u++) {
          int64_t col = (first + u) * WIDTH;
          const uint8_t *here = bits + (row + r) * bit_pitch + col / 8;
          uint32_t mask = col + WIDTH <= cols ? mask_at<WIDTH>(here, 0) : last_mask(here, cols - col);
          dense[r][u] = inside ? U::inside(values + at[r], mask) : U::bounded(values + at[r], mask, total - at[r]);
          at[r] += __builtin_popcount(mask);
        }
      for (int64_t t = 0; t < tokens; t += 4) {
        f32x16 here[N][4];
        for (int r = 0; r < N; r++)
          for (int i = 0; i < 4; i++) here[r][i] = sums[r][t + i];
        const X *from = xs + t * pitch + first * WIDTH;
        for (int64_t u = 0; u < some; u++, from += WIDTH)
          for (int i = 0; i < 4; i++)
            for (int r = 0; r < N; r++) here[r][i] = U::fma(here[r][i], dense[r][u], from + i * pitch);
        for (int r = 0; r < N; r++)
          for (int i = 0; i < 4; i++) sums[r][t + i] = here[r][i];
      }
    }
    for (int64_t r = 0; r < n; r++) {
      fits = fits && at[r] == starts.start(row + r + 1);
      float b = bias ? to_float(bias[row + r]) : 0;
      for (int64_t t = 0; t < tokens; t++) from_float(y + t * rows + row + r, hsum(sums[r][t]) + b);
    }
  }
  return fits;
}

template <typename E>
bool bits_linear_for(const void *x, const void *values, int64_t total, const uint8_t *bits, Rows starts,
                     const void *bias, void *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  auto run = tokens <= 1 ? bits_linear<1, E> : tokens <= 2 ? bits_linear<2, E> : bits_many<E>;
  return run((const E *)x, (const E *)values, total, bits, starts, (const E *)bias, (E *)y, tokens, rows, cols,
             threads);
}

template <typename E>
bool unpack_bits(const E *values, int64_t total, const uint8_t *bits, Rows starts, E *out, int64_t cols, int64_t first,
                 int64_t last, int64_t threads) {
  constexpr int WIDTH = Unit<E>::WIDTH;
  int64_t bit_pitch = ceil_div(cols, 8);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t row = first; row < last; row++) {
    int64_t at = starts.start(row), end = starts.start(row + 1);
    if (!in_order(at, end, total)) {
      fits = false;
      continue;
    }
    bool inside = at + cols + WIDTH <= total;
    for (int64_t c = 0; c < cols; c += WIDTH) {
      int64_t n = min_of(WIDTH, cols - c);
      const uint8_t *here = bits + row * bit_pitch + c / 8;
      uint32_t mask = n == WIDTH ? mask_at<WIDTH>(here, 0) : last_mask(here, n);
      auto w = inside ? Unit<E>::inside(values + at, mask) : Unit<E>::bounded(values + at, mask, total - at);
      Unit<E>::put(out + (row - first) * cols + c, w, n);
      at += __builtin_popcount(mask);
    }
    fits = fits && at == end;
  }
  return fits;
}

// sums[t] += the products of one row of a block, n long, with T tokens.
template <int T, typename E>
INLINE void block_row(f32x16 *sums, const E *w, const float *x, int64_t pitch, int64_t n) {
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) {
    f32x16 part = load(w + c);
    for (int t = 0; t < T; t++) sums[t] += part * load(x + t * pitch + c);
  }
  if (c < n) {
    f32x16 part = load_n(w + c, n - c);
    for (int t = 0; t < T; t++) sums[t] += part * load_n(x + t * pitch + c, n - c);
  }
}

// A row of blocks with one row each, in registers; several sums a token hide the latency of the additions. The block
// columns are in range.
template <int T, typename E>
INLINE void flat_blocks(f32x16 *sums, const E *values, const int32_t *columns, int64_t count, const float *x,
                        int64_t pitch, int64_t bc) {
  constexpr int CHAINS = T <= 2 ? 4 : T <= 4 ? 2 : 1;
  f32x16 parts[CHAINS][T] = {};
  int64_t b = 0;
  if (bc == LANES)
    for (; b + CHAINS <= count; b += CHAINS)
      for (int chain = 0; chain < CHAINS; chain++)
        block_row<T>(parts[chain], values + (b + chain) * LANES, x + columns[b + chain] * LANES, pitch, LANES);
  for (; b < count; b++) block_row<T>(parts[0], values + b * bc, x + columns[b] * bc, pitch, bc);
  for (int t = 0; t < T; t++) {
    sums[t] = parts[0][t];
    for (int chain = 1; chain < CHAINS; chain++) sums[t] += parts[chain][t];
  }
}

// Block rows: sums[i][t] over the blocks of a row, in memory (level 1) between blocks of several rows.
template <int T, typename E>
bool blocks_linear(const E *x, const E *values, const int32_t *columns, int64_t num_blocks, const int32_t *offsets,
                   const E *bias, E *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc,
                   int64_t threads) {
  int64_t rows = block_rows * br, block_cols = cols / bc;
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
      bool right = true;
      for (int64_t b = from; b < to; b++) right &= (uint32_t)columns[b] < (uint64_t)block_cols;
      if (!right) {
        fits = false;
        continue;
      }
      const E *w = values + from * br * bc;
      if (br == 1)
        flat_blocks<T>(sums, w, columns + from, to - from, xs, cols, bc);
      else
        for (int64_t b = from; b < to; b++)
          for (int64_t i = 0; i < br; i++, w += bc) {
            f32x16 here[T];
            for (int t = 0; t < T; t++) here[t] = sums[i * T + t];
            block_row<T>(here, w, xs + columns[b] * bc, cols, bc);
            for (int t = 0; t < T; t++) sums[i * T + t] = here[t];
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
