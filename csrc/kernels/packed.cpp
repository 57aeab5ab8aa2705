// Linears of up to 16 tokens with packed weights, unpacked in registers: one bit per entry (N:M and bitmask alike).
// Each output is summed in one order, whatever the number of threads.
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

// sums[r][t] += the products of eight unpacked rows with I tokens over `some` units, four rows at a time in registers.
template <int I, typename U>
INLINE void rows_by_tokens(f32x16 (*sums)[16], const typename U::W (*dense)[16], const typename U::X *x, int64_t t,
                           int64_t some) {
  for (int half = 0; half < 8; half += 4) {
    f32x16 here[4][I];
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < I; i++) here[r][i] = sums[half + r][t + i];
    const typename U::X *from = x;
    for (int64_t u = 0; u < some; u++, from += 4 * U::WIDTH)
      for (int i = 0; i < I; i++)
        for (int r = 0; r < 4; r++) here[r][i] = U::fma(here[r][i], dense[half + r][u], from + i * U::WIDTH);
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < I; i++) sums[half + r][t + i] = here[r][i];
  }
}

// The same for more tokens: eight rows are unpacked a stretch at a time and meet four tokens at a time, so that what is
// loaded is used four times. `sums` of the tokens stay in a level-1 cache between stretches. x in scratch is
// [fours of tokens][units][4][WIDTH], which is read from front to back.
template <typename E>
bool bits_many(const E *x, const E *values, int64_t total, const uint8_t *bits, Rows starts, const E *bias, E *y,
               int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  typedef Unit<E> U;
  typedef typename U::X X;
  constexpr int WIDTH = U::WIDTH, STRETCH = 16, N = 8, MOST = 16;
  int64_t units = ceil_div(cols, WIDTH), bit_pitch = ceil_div(cols, 8);
  Scratch x_at(MOST * units * WIDTH * sizeof(X));
  X *xs = (X *)x_at.at;
  memset(xs, 0, MOST * units * WIDTH * sizeof(X));
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t u = 0; u < units; u++) {
      X *to = xs + ((t / 4 * units + u) * 4 + t % 4) * WIDTH;
      const E *from = x + t * cols + u * WIDTH;
      for (int64_t c = 0; c < min_of(WIDTH, cols - u * WIDTH); c++) assign(to + c, from[c]);
    }
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
        const X *from = xs + (t / 4 * units + first) * 4 * WIDTH;
        switch (tokens - t) {
          case 1: rows_by_tokens<1, U>(sums, dense, from, t, some); break;
          case 2: rows_by_tokens<2, U>(sums, dense, from, t, some); break;
          case 3: rows_by_tokens<3, U>(sums, dense, from, t, some); break;
          default: rows_by_tokens<4, U>(sums, dense, from, t, some);
        }
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
