// Linears of up to 16 tokens with packed weights of dense blocks. Each output is summed in one order, whatever the
// number of threads.
#include "slices.h"

namespace {

// Blocks [br, bc], bc a multiple of 16.
template <typename E>
struct Dense {
  typedef Slice<E> S;
  const E *values;
  int64_t br, bc;
  __attribute__((always_inline)) typename S::W at(int64_t b, int64_t row, int64_t slice) const {
    return S::of(values + (b * br + row) * bc + slice * LANES);
  }
};

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

template <typename E>
bool block_slices(const void *x, const void *values, Columns columns, int64_t num_blocks, const int32_t *offsets,
                  const void *bias, void *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc,
                  int64_t threads) {
  typedef Dense<E> B;
  auto run = tokens <= 4    ? slices_linear<4, E, B>
             : tokens <= 8  ? slices_linear<8, E, B>
             : tokens <= 12 ? slices_linear<12, E, B>
                            : slices_linear<16, E, B>;
  return run((const E *)x, B{(const E *)values, br, bc}, columns, num_blocks, offsets, (const E *)bias, (E *)y, tokens,
             block_rows, cols, br, bc, threads);
}

}  // namespace

// Returns 1 where a block column or a row's offsets are out of range.
PAUCITY_KERNEL(packed_blocks)
(const void *x, const void *values, const int32_t *columns, int64_t num_blocks, const int32_t *offsets,
 const void *bias, void *y, int64_t tokens, int64_t block_rows, int64_t cols, int64_t br, int64_t bc, int64_t dtype,
 int64_t threads) {
  if (bc % LANES == 0 && tokens > 2) {
    auto run = dtype == BF16 ? block_slices<bf16> : block_slices<float>;
    Columns at = columns_of(columns, true);
    return !run(x, values, at, num_blocks, offsets, bias, y, tokens, block_rows, cols, br, bc, threads);
  }
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
