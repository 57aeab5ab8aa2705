// Optimal brain surgeon over a block of inputs: what is removed of an input is made up for by the inputs after it.
#include "../simd.h"

namespace {

// Which n of the m scores at `at` stay, the highest, of equal ones the first: -1 or 0 each.
INLINE void choose(const f32x16 *scores, i32x16 *kept, int64_t n, int64_t m) {
  for (int64_t i = 0; i < m; i++) {
    i32x16 above = {};
    for (int64_t j = 0; j < m; j++) {
      if (j == i) continue;
      above -= j < i ? (scores[j] >= scores[i]) : (scores[j] > scores[i]);
    }
    kept[i] = above < (int32_t)n;
  }
}

INLINE void write(uint8_t *to, i32x16 kept, int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; lane++) to[lane] = kept[lane] != 0;
}

INLINE i32x16 read(const uint8_t *from, int64_t lanes) {
  i32x16 kept = {};
  for (int64_t lane = 0; lane < lanes; lane++) kept[lane] = -(from[lane] != 0);
  return kept;
}

}  // namespace

// weight, errors: [cols, rows] float32, mask: [cols, rows] bytes, factor: [cols, cols] with `stride` floats a row, upper
// triangular. Input after input, what `mask` does not keep is removed; `errors` gets it over the factor's diagonal, and
// the inputs behind lose errors times the factor's row. With m > 0 the mask is narrowed to n of every m inputs in turn.
PAUCITY_KERNEL(column_sweep)
(float *weight, uint8_t *mask, float *errors, const float *factor, int64_t cols, int64_t rows, int64_t stride, int64_t n,
 int64_t m, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch a(cols * sizeof(f32x16)), b(m * sizeof(f32x16) + 64), c(m * sizeof(i32x16) + 64), d(m * sizeof(i32x16) + 64);
    f32x16 *w = (f32x16 *)a.at, *scores = (f32x16 *)b.at;
    i32x16 *chosen = (i32x16 *)c.at, *live = (i32x16 *)d.at;
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < ceil_div(rows, LANES); strip++) {
      const int64_t row = strip * LANES, lanes = min_of(LANES, rows - row);
      for (int64_t i = 0; i < cols; i++) w[i] = load_n(weight + i * rows + row, lanes);
      for (int64_t i = 0; i < cols; i++) {
        const float *u = factor + i * stride;
        if (m && i % m == 0) {
          for (int64_t j = 0; j < m; j++) {
            const f32x16 scaled = w[i + j] / factor[(i + j) * stride + i + j];
            live[j] = read(mask + (i + j) * rows + row, lanes);
            scores[j] = live[j] ? scaled * scaled : set1(-1.0f);
          }
          choose(scores, chosen, n, m);
          for (int64_t j = 0; j < m; j++) {
            chosen[j] &= live[j];
            write(mask + (i + j) * rows + row, chosen[j], lanes);
          }
        }
        const i32x16 kept = m ? chosen[i % m] : read(mask + i * rows + row, lanes);
        const f32x16 error = (f32x16)((i32x16)w[i] & ~kept) / u[i];
        w[i] = (f32x16)((i32x16)w[i] & kept);
        store_n(errors + i * rows + row, error, lanes);
        for (int64_t j = i + 1; j < cols; j++) w[j] -= error * u[j];
      }
      for (int64_t i = 0; i < cols; i++) store_n(weight + i * rows + row, w[i], lanes);
    }
  }
  return 0;
}
