// What packed weights of whole blocks share: 16 consecutive weights of a row at a time, for up to 16 tokens.
#pragma once

#include "simd.h"

namespace {

// A slice: 16 consecutive weights of a row, and what multiplies them. X is the type of x in scratch.
template <typename E>
struct Slice;

template <>
struct Slice<float> {
  typedef float X;
  typedef f32x16 W, Sum;
  INLINE W of(const float *p) { return load(p); }
  INLINE W of(f32x16 w) { return w; }
  INLINE Sum fma(Sum sum, W w, const X *x) { return sum + w * load(x); }
  INLINE float total(Sum sum) { return hsum(sum); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <>
struct Slice<bf16> {
  typedef bf16 X;
  typedef __m256i W;
  typedef __m256 Sum;
  INLINE W of(const bf16 *p) { return _mm256_loadu_si256((const __m256i *)p); }
  INLINE W of(f32x16 w) { return (W)to_bf16(w); }
  INLINE Sum fma(Sum sum, W w, const X *x) {
    return _mm256_dpbf16_ps(sum, (__m256bh)w, (__m256bh)_mm256_loadu_si256((const __m256i *)x));
  }
  INLINE float total(Sum sum) { return hsum((f32x16)_mm512_zextps256_ps512(sum)); }
};
#else
template <>
struct Slice<bf16> {
  typedef float X;
  typedef f32x16 W, Sum;
  INLINE W of(const bf16 *p) { return load(p); }
  INLINE W of(f32x16 w) { return (f32x16)(__builtin_convertvector(to_bf16(w), u32x16) << 16); }
  INLINE Sum fma(Sum sum, W w, const X *x) { return sum + w * load(x); }
  INLINE float total(Sum sum) { return hsum(sum); }
};
#endif

INLINE void assign(float *to, float x) { *to = x; }
INLINE void assign(float *to, bf16 x) { *to = to_float(x); }
INLINE void assign(bf16 *to, bf16 x) { *to = x; }

// x [tokens, cols] as [slices][room][16], 0 past the tokens and the columns: the tokens of a slice lie together.
template <typename E>
void lay_slices(typename Slice<E>::X *to, const E *x, int64_t tokens, int64_t room, int64_t cols) {
  memset(to, 0, ceil_div(cols, LANES) * room * LANES * sizeof *to);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < cols; c++) assign(to + (c / LANES * room + t) * LANES + c % LANES, x[t * cols + c]);
}

// Where the blocks of a row of blocks start, and the block column of each.
struct Columns {
  const int16_t *narrow;
  const int32_t *wide;
  __attribute__((always_inline)) int64_t at(int64_t b) const { return wide ? wide[b] : narrow[b]; }
};

INLINE Columns columns_of(const void *columns, int64_t wide) {
  return wide ? Columns{nullptr, (const int32_t *)columns} : Columns{(const int16_t *)columns, nullptr};
}

// Whether the blocks from `from` to `to` exist and lie within the weight.
INLINE bool within(Columns columns, int64_t from, int64_t to, int64_t num_blocks, int64_t block_cols) {
  if (from < 0 || to < from || to > num_blocks) return false;
  bool right = true;
  for (int64_t b = from; b < to; b++) right &= (uint64_t)columns.at(b) < (uint64_t)block_cols;
  return right;
}

// sums[r * room + t] += rows `row` to `row + N` of a row of blocks by T tokens, over the blocks `from` to `to`. Few
// products at a time are summed in several chains, to hide the latency of the additions.
template <int N, int T, typename Blocks>
INLINE void tile(typename Blocks::S::Sum *sums, Blocks blocks, Columns columns, int64_t row, int64_t from, int64_t to,
                 int64_t slices, const typename Blocks::S::X *x, int64_t room) {
  typedef typename Blocks::S S;
  constexpr int CHAINS = N * T <= 2 ? 4 : N * T <= 4 ? 2 : 1;
  typename S::Sum here[CHAINS][N][T] = {};
  for (int r = 0; r < N; r++)
    for (int t = 0; t < T; t++) here[0][r][t] = sums[r * room + t];
  auto add = [&](int chain, int64_t b) __attribute__((always_inline)) {
    const typename S::X *at = x + columns.at(b) * slices * room * LANES;
    for (int64_t s = 0; s < slices; s++, at += room * LANES) {
      typename S::W w[N];
      for (int r = 0; r < N; r++) w[r] = blocks.at(b, row + r, s);
      for (int t = 0; t < T; t++)
        for (int r = 0; r < N; r++) here[chain][r][t] = S::fma(here[chain][r][t], w[r], at + t * LANES);
    }
  };
  int64_t b = from;
  for (; b + CHAINS <= to; b += CHAINS)
    for (int chain = 0; chain < CHAINS; chain++) add(chain, b + chain);
  for (; b < to; b++) add(0, b);
  for (int r = 0; r < N; r++)
    for (int t = 0; t < T; t++) {
      for (int chain = 1; chain < CHAINS; chain++) here[0][r][t] += here[chain][r][t];
      sums[r * room + t] = here[0][r][t];
    }
}

// Blocks of slices: four rows meet four tokens at a time; of fewer rows, each meets ROOM tokens at once. Blocks that
// fit a level-1 cache are read for all of their rows before the next ones.
template <int ROOM, typename E, typename Blocks>
bool slices_linear(const E *x, Blocks blocks, Columns columns, int64_t num_blocks, const int32_t *offsets,
                   const E *bias, E *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc,
                   int64_t threads) {
  typedef typename Blocks::S S;
  typedef typename S::Sum Sum;
  int64_t rows = block_rows * br, slices = bc / LANES, step = max_of(1, 16384 / (br * bc * (int64_t)sizeof(E)));
  if (br == 1) step = num_blocks + 1;
  Scratch x_at(ROOM * cols * sizeof(typename S::X));
  typename S::X *xs = (typename S::X *)x_at.at;
  lay_slices<E>(xs, x, tokens, ROOM, cols);
  bool fits = true;
#pragma omp parallel num_threads(threads) reduction(&& : fits)
  {
    Scratch sums_at(br * ROOM * sizeof(Sum));
    Sum *sums = (Sum *)sums_at.at;
#pragma omp for schedule(static)
    for (int64_t block_row = 0; block_row < block_rows; block_row++) {
      int64_t from = offsets[block_row], last = offsets[block_row + 1];
      if (!within(columns, from, last, num_blocks, cols / bc)) {
        fits = false;
        continue;
      }
      memset((void *)sums, 0, br * ROOM * sizeof(Sum));
      for (int64_t to; from < last; from = to) {
        int64_t row = 0;
        to = min_of(from + step, last);
        if (ROOM >= 4)
          for (; row + 4 <= br; row += 4)
            for (int64_t t = 0; t < tokens; t += 4)
              tile<4, 4>(sums + row * ROOM + t, blocks, columns, row, from, to, slices, xs + t * LANES, ROOM);
        for (; row < br; row++) tile<1, ROOM>(sums + row * ROOM, blocks, columns, row, from, to, slices, xs, ROOM);
      }
      for (int64_t r = 0; r < br; r++) {
        float b = bias ? to_float(bias[block_row * br + r]) : 0;
        for (int64_t t = 0; t < tokens; t++)
          from_float(y + t * rows + block_row * br + r, S::total(sums[r * ROOM + t]) + b);
      }
    }
  }
  return fits;
}

}  // namespace
