// A sparse matrix (compressed rows) times channels-first inputs [batch, channels, pixels]. The pixels are taken in
// panels: a panel of all channels, copied together in float32, stays in the second cache while every row of the matrix
// passes over it.
#include <type_traits>

#include "../simd.h"

namespace {

constexpr int WIDE = 4;                  // vectors of a panel's row
constexpr int64_t PANEL = WIDE * LANES;  // pixels of a panel
constexpr int DEEP = 16;                  // the same for products at the pattern, where each ends in one sum
constexpr int64_t DEEP_PANEL = DEEP * LANES;

bool is_pattern(const int32_t *columns, const int32_t *offsets, int64_t entries, int64_t rows, int64_t size) {
  if (offsets[0] != 0 || offsets[rows] != entries) return false;
  bool right = true;
  for (int64_t r = 0; r < rows; r++) right &= offsets[r] <= offsets[r + 1];
  for (int64_t e = 0; e < entries; e++) right &= (uint64_t)(int64_t)columns[e] < (uint64_t)size;
  return right;
}

// Pixels [start, start + pixels) of all channels, as rows of `width`, 0 beyond.
template <typename T>
void copy_panel(float *panel, const T *x, int64_t channels, int64_t stride, int64_t pixels, int64_t width) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t p = 0; p < width; p += LANES)
      store(panel + c * width + p, load_n(x + c * stride + min_of(p, pixels), max_of(0, min_of(LANES, pixels - p))));
}

// Images [0, count) whole and side by side, `pixels` each, as rows of PANEL; what is beyond them stays as it was.
template <typename T>
void copy_images(float *panel, const T *x, int64_t count, int64_t channels, int64_t pixels) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t p = 0; p < pixels; p += LANES) {
        int64_t n = min_of(LANES, pixels - p);
        store_n(panel + c * PANEL + i * pixels + p, load_n(x + (i * channels + c) * pixels + p, n), n);
      }
}

// One row of the matrix, its entries [e, end), over the first W vectors of a panel's rows.
template <int W>
INLINE void row_sums(f32x16 *sums, const float *values, const int32_t *columns, int64_t e, int64_t end,
                     const float *panel) {
  // Even and odd entries in sums of their own: one chain would wait for each product.
  f32x16 even[W] = {}, odd[W] = {};
  for (; e + 2 <= end; e += 2) {
    const float *a = panel + (int64_t)columns[e] * PANEL, *c = panel + (int64_t)columns[e + 1] * PANEL;
    f32x16 v = set1(values[e]), w = set1(values[e + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      even[i] += v * load(a + i * LANES);
      odd[i] += w * load(c + i * LANES);
    }
  }
  if (e < end) {
    const float *a = panel + (int64_t)columns[e] * PANEL;
    f32x16 v = set1(values[e]);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) even[i] += v * load(a + i * LANES);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) sums[i] = even[i] + odd[i];
}

template <typename T>
void spmm(const float *values, const int32_t *columns, const int32_t *offsets, const T *x, const T *bias, T *out,
          int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t threads) {
  // Of small images as many as fit share a panel, so that it is full.
  int64_t together = max_of(1, min_of(batch, PANEL / max_of(1, pixels)));
  int64_t panels = ceil_div(pixels, PANEL), groups = ceil_div(batch, together);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(size * PANEL * sizeof(float));
    float *panel = (float *)scratch.at;
    if (together > 1) memset(panel, 0, size * PANEL * sizeof(float));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < groups * panels; item++) {
      int64_t first = item / panels * together, start = item % panels * PANEL;
      int64_t count = min_of(together, batch - first), width = min_of(PANEL, count * pixels - start);
      if (together > 1)
        copy_images(panel, x + first * size * pixels, count, size, pixels);
      else
        copy_panel(panel, x + first * size * pixels + start, size, pixels, width, PANEL);
      auto pass = [&](auto vectors) {
        constexpr int W = decltype(vectors)::value;
        for (int64_t r = 0; r < rows; r++) {
          f32x16 sums[W], added = set1(bias ? to_float(bias[r]) : 0.0f);
          row_sums<W>(sums, values, columns, offsets[r], offsets[r + 1], panel);
          T *to = out + (first * rows + r) * pixels + start;
          if (count == 1) {
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
              if (width >= (i + 1) * LANES)
                store(to + i * LANES, sums[i] + added);
              else
                store_n(to + i * LANES, sums[i] + added, width - i * LANES);
            continue;
          }
          float row[PANEL + LANES];
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) store(row + i * LANES, sums[i] + added);
          for (int64_t i = 0; i < count; i++)
            for (int64_t p = 0; p < pixels; p += LANES)
              store_n(to + i * rows * pixels + p, load(row + i * pixels + p), min_of(LANES, pixels - p));
        }
      };
      switch (ceil_div(width, LANES)) {
        case 1: pass(std::integral_constant<int, 1>()); break;
        case 2: pass(std::integral_constant<int, 2>()); break;
        case 3: pass(std::integral_constant<int, 3>()); break;
        default: pass(std::integral_constant<int, WIDE>());
      }
    }
  }
}

// Rows and columns exchanged, by counting: the entries of a new row stay in the order of the old rows.
template <typename T>
void spmm_transposed(const float *values, const int32_t *columns, const int32_t *offsets, const T *x, T *out,
                     int64_t entries, int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t threads) {
  Scratch a(entries * sizeof(float)), b(entries * sizeof(int32_t)), c((size + 2) * sizeof(int32_t));
  float *moved = (float *)a.at;
  int32_t *from = (int32_t *)b.at, *first = (int32_t *)c.at;
  memset(first, 0, (size + 2) * sizeof(int32_t));
  for (int64_t e = 0; e < entries; e++) first[columns[e] + 2]++;
  for (int64_t i = 1; i <= size; i++) first[i + 1] += first[i];
  for (int64_t r = 0; r < rows; r++)
    for (int64_t e = offsets[r]; e < offsets[r + 1]; e++) {
      int32_t to = first[columns[e] + 1]++;
      moved[to] = values[e];
      from[to] = (int32_t)r;
    }
  spmm<T>(moved, from, first, x, nullptr, out, batch, size, rows, pixels, threads);
}

template <typename T>
void sddmm(const int32_t *columns, const int32_t *offsets, const T *grad, const T *x, T *out, int64_t entries,
           int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t threads) {
  Scratch totals(entries * sizeof(float));
  float *sums = (float *)totals.at;
  memset(sums, 0, entries * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    Scratch scratch(size * DEEP_PANEL * sizeof(float));
    float *panel = (float *)scratch.at;
    int64_t from = 0, to = 0;  // rows with about an equal share of the entries
    while (from < rows && part > 0 && offsets[from] < entries * part / threads) from++;
    while (to < rows && (part + 1 == threads || offsets[to] < entries * (part + 1) / threads)) to++;
    for (int64_t b = 0; b < batch; b++)
      for (int64_t start = 0; start < pixels; start += DEEP_PANEL) {
        int64_t width = min_of(DEEP_PANEL, pixels - start);
        copy_panel(panel, x + b * size * pixels + start, size, pixels, width, DEEP_PANEL);
        for (int64_t r = from; r < to; r++) {
          if (offsets[r] == offsets[r + 1]) continue;
          const T *row = grad + (b * rows + r) * pixels + start;
          f32x16 held[DEEP];
#pragma GCC unroll 16
          for (int i = 0; i < DEEP; i++)
            held[i] = load_n(row + min_of(i * LANES, width), max_of(0, min_of(LANES, width - i * LANES)));
          for (int64_t e = offsets[r]; e < offsets[r + 1]; e++) {
            const float *at = panel + (int64_t)columns[e] * DEEP_PANEL;
            f32x16 s[4] = {};
#pragma GCC unroll 16
            for (int i = 0; i < DEEP; i++) s[i % 4] += held[i] * load(at + i * LANES);
            sums[e] += hsum((s[0] + s[1]) + (s[2] + s[3]));
          }
        }
      }
    int64_t end = offsets[to];
    for (int64_t e = offsets[from]; e < end; e++) from_float(out + e, sums[e]);
  }
}

}  // namespace

// Each returns 1 where the offsets do not ascend over all entries, or a column is not in [0, size).

PAUCITY_KERNEL(spmm)
(const float *values, const int32_t *columns, const int32_t *offsets, const void *x, const void *bias, void *out,
 int64_t entries, int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t dtype, int64_t threads) {
  if (!is_pattern(columns, offsets, entries, rows, size)) return 1;
  if (dtype == BF16)
    spmm(values, columns, offsets, (const bf16 *)x, (const bf16 *)bias, (bf16 *)out, batch, rows, size, pixels,
         threads);
  else
    spmm(values, columns, offsets, (const float *)x, (const float *)bias, (float *)out, batch, rows, size, pixels,
         threads);
  return 0;
}

PAUCITY_KERNEL(spmm_transposed)
(const float *values, const int32_t *columns, const int32_t *offsets, const void *x, void *out, int64_t entries,
 int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t dtype, int64_t threads) {
  if (!is_pattern(columns, offsets, entries, rows, size)) return 1;
  if (dtype == BF16)
    spmm_transposed(values, columns, offsets, (const bf16 *)x, (bf16 *)out, entries, batch, rows, size, pixels,
                    threads);
  else
    spmm_transposed(values, columns, offsets, (const float *)x, (float *)out, entries, batch, rows, size, pixels,
                    threads);
  return 0;
}

PAUCITY_KERNEL(sddmm)
(const int32_t *columns, const int32_t *offsets, const void *grad, const void *x, void *out, int64_t entries,
 int64_t batch, int64_t rows, int64_t size, int64_t pixels, int64_t dtype, int64_t threads) {
  if (!is_pattern(columns, offsets, entries, rows, size)) return 1;
  if (dtype == BF16)
    sddmm(columns, offsets, (const bf16 *)grad, (const bf16 *)x, (bf16 *)out, entries, batch, rows, size, pixels,
          threads);
  else
    sddmm(columns, offsets, (const float *)grad, (const float *)x, (float *)out, entries, batch, rows, size, pixels,
          threads);
  return 0;
}
