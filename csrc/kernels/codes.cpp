// Sparse codes: sums of gathered rows, dot products with gathered rows, and the scatter of outer products. The rows are
// read in blocks of columns that stay in the last cache, since each of them is named by many codes.
#include "../simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int WIDE = 16;                       // vectors of a strip: its sums stay in registers
constexpr int64_t STRIP = WIDE * LANES;        // columns of a strip
constexpr int64_t RESIDENT = 24 << 20;         // bytes of a table that shall stay in the last cache
constexpr int AHEAD = 8;                       // rows fetched ahead

// Columns of a block of a table with `rows` rows: whole strips.
INLINE int64_t columns_resident(int64_t rows, int64_t d, int64_t size) {
  int64_t strips = max_of(1, RESIDENT / max_of(1, rows * size * STRIP));
  return max_of(1, min_of(strips * STRIP, d));
}

// Take the pages of fresh memory from the system at once: one by one, as they are written, costs more than the sums do.
INLINE void populate(void *at, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const int64_t page = 4096, from = ((int64_t)at + page - 1) / page * page, to = ((int64_t)at + bytes) / page * page;
  if (to - from >= 1 << 20) madvise((void *)from, to - from, MADV_POPULATE_WRITE);  // a kernel without it refuses
#endif
}

// Store what is not read again soon: past the caches where the place is aligned.
INLINE void store_once(float *p, f32x16 v) {
#if defined(__AVX512F__)
  if (((uintptr_t)p & 63) == 0) return _mm512_stream_ps(p, (__m512)v);
#endif
  store(p, v);
}
INLINE void store_once(bf16 *p, f32x16 v) { store(p, v); }

template <typename T>
INLINE void fetch(const T *row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + c);
}

// out[columns] = sum of weights[j] * table[rows[j]][columns], over at most one strip; a weight of 0 is skipped.
template <typename T, typename V>
INLINE void sum_strip(T *out, const V *weights, const int32_t *rows, int64_t count, const T *table, int64_t d,
                      int64_t columns) {
  if (columns == STRIP) {
    f32x16 sums[WIDE] = {};
    for (int64_t j = 0; j < count; j++) {
      float weight = to_float(weights[j]);
      fetch(table + rows[j + AHEAD] * d, STRIP);
      if (weight == 0) continue;
      const T *row = table + rows[j] * d;
#pragma GCC unroll 16
      for (int i = 0; i < WIDE; i++) sums[i] += set1(weight) * load(row + i * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDE; i++) store(out + i * LANES, sums[i]);
    return;
  }
  for (int64_t c = 0; c < columns; c += LANES) {
    int64_t n = min_of(LANES, columns - c);
    f32x16 sum = {};
    for (int64_t j = 0; j < count; j++) {
      float weight = to_float(weights[j]);
      if (weight != 0) sum += set1(weight) * load_n(table + rows[j] * d + c, n);
    }
    store_n(out + c, sum, n);
  }
}

template <typename T>
void gather_sum(const T *values, const int32_t *indices, const T *table, T *out, int64_t n, int64_t k, int64_t size,
                int64_t d, int64_t threads) {
  int64_t block = columns_resident(size, d, sizeof(T));
#pragma omp parallel num_threads(threads)
  {
    Scratch ahead((k + AHEAD) * sizeof(int32_t));
    int32_t *rows = (int32_t *)ahead.at;
    for (int64_t start = 0; start < d; start += block) {
      int64_t stop = min_of(start + block, d);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < n; t++) {
        memcpy(rows, indices + t * k, k * sizeof(int32_t));
        for (int j = 0; j < AHEAD; j++) rows[k + j] = t + 1 < n ? indices[(t + 1) * k + min_of(j, k - 1)] : rows[k - 1];
        for (int64_t c = start; c < stop; c += STRIP)
          sum_strip(out + t * d + c, values + t * k, rows, k, table + c, d, min_of(STRIP, stop - c));
      }
    }
  }
}

template <typename T>
void gather_dot(const T *x, const int32_t *indices, const T *table, const T *bias, T *out, int64_t n, int64_t k,
                int64_t size, int64_t d, int64_t threads) {
  int64_t block = columns_resident(size, d, sizeof(T));
  Scratch partial(n * k * sizeof(float));
  float *sums = (float *)partial.at;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t start = 0; start == 0 || start < d; start += block) {
      int64_t stop = min_of(start + block, d);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < n; t++) {
        float *row_sums = sums + t * k;
        const int32_t *rows = indices + t * k;
        int64_t left = (n - t) * k;
        if (start == 0) memset(row_sums, 0, k * sizeof(float));
        for (int64_t c = start; c < stop; c += STRIP) {
          const T *at = x + t * d + c;
          int64_t columns = min_of(STRIP, stop - c);
          f32x16 held[WIDE];
          for (int i = 0; i < WIDE; i++)
            held[i] = load_n(at + min_of(i * LANES, columns), min_of(LANES, max_of(0, columns - i * LANES)));
          for (int64_t j = 0; j < k; j++) {
            const T *row = table + rows[j] * d + c;
            f32x16 a = {}, b = {};
            if (columns == STRIP) {
              fetch(table + rows[min_of(j + AHEAD, left - 1)] * d + c, STRIP);
#pragma GCC unroll 16
              for (int i = 0; i < WIDE; i += 2) {
                a += held[i] * load(row + i * LANES);
                b += held[i + 1] * load(row + (i + 1) * LANES);
              }
            } else {
              for (int i = 0; i * LANES < columns; i++)
                a += held[i] * load_n(row + i * LANES, min_of(LANES, columns - i * LANES));
            }
            row_sums[j] += hsum(a + b);
          }
        }
        if (stop == d)
          for (int64_t j = 0; j < k; j++)
            from_float(out + t * k + j, row_sums[j] + (bias ? to_float(bias[rows[j]]) : 0.0f));
      }
    }
  }
}

// The entries of all codes by atom, the tokens of an atom in their order whatever the number of threads.
template <typename T>
struct ByAtom {
  Scratch first_, tokens_, weights_, places_;
  int64_t *first;   // entries of atom a: first[a] to first[a + 1]
  int32_t *token;   // and AHEAD more, which are valid
  float *weight;
  int32_t *place;   // entry in the order of the codes

  ByAtom(const T *values, const int32_t *indices, int64_t n, int64_t k, int64_t size)
      : first_((size + 2) * sizeof(int64_t)), tokens_((n * k + AHEAD) * sizeof(int32_t)),
        weights_(n * k * sizeof(float)), places_(n * k * sizeof(int32_t)), first((int64_t *)first_.at),
        token((int32_t *)tokens_.at), weight((float *)weights_.at), place((int32_t *)places_.at) {
    memset(first, 0, (size + 2) * sizeof(int64_t));
    for (int64_t e = 0; e < n * k; e++) first[indices[e] + 2]++;
    for (int64_t a = 1; a <= size; a++) first[a + 1] += first[a];
    for (int64_t t = 0, e = 0; t < n; t++)
      for (int64_t j = 0; j < k; j++, e++) {
        int64_t to = first[indices[e] + 1]++;
        token[to] = (int32_t)t;
        weight[to] = to_float(values[e]);
        place[to] = (int32_t)e;
      }
    for (int j = 0; j < AHEAD; j++) token[n * k + j] = 0;
  }

  // First atom of one of `parts` consecutive ranges with about as many entries and atoms each.
  int64_t part(int64_t part, int64_t parts, int64_t size) const {
    int64_t low = 0, high = size, wanted = (first[size] + size) / parts * part;
    if (part == parts) return size;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (first[middle] + middle < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

template <typename T>
void scatter_outer(const T *values, const int32_t *indices, const T *x, T *out, int64_t n, int64_t k, int64_t size,
                   int64_t d, int64_t threads) {
  ByAtom<T> by(values, indices, n, k, size);
  int64_t block = columns_resident(n, d, sizeof(T));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    int64_t begin = by.part(part, threads, size), end = by.part(part + 1, threads, size);
    populate(out + begin * d, (end - begin) * d * sizeof(T));
    for (int64_t start = 0; start < d; start += block) {
      int64_t stop = min_of(start + block, d);
      for (int64_t a = begin; a < end; a++)
        for (int64_t c = start; c < stop; c += STRIP)
          sum_strip(out + a * d + c, by.weight + by.first[a], by.token + by.first[a], by.first[a + 1] - by.first[a],
                    x + c, d, min_of(STRIP, stop - c));
    }
  }
}

// Both gradients of gather_sum, atom by atom: a row of `grad` that is read for the atom's gradient is also multiplied
// with the atom, which gives the gradient of the value. `dots` gathers the products of an entry lane by lane.
constexpr int HALF = 8;  // vectors of an atom held in registers, beside as many sums

template <typename T>
INLINE void backward_strip(T *out, const T *atom, const float *weights, const int32_t *tokens, int64_t count,
                           const T *grad, int64_t d, int64_t columns, f32x16 *dots) {
  if (columns == HALF * LANES) {
    f32x16 sums[HALF] = {}, held[HALF];
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) held[i] = load(atom + i * LANES);
    for (int64_t j = 0; j < count; j++) {
      const T *row = grad + tokens[j] * d;
      float weight = weights[j];
      f32x16 a = dots[j], b = {}, w = set1(weight);
      fetch(row + HALF * LANES, HALF * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < HALF; i += 2) {
        f32x16 x = load(row + i * LANES), y = load(row + (i + 1) * LANES);
        a += held[i] * x;
        b += held[i + 1] * y;
        if (weight != 0) {
          sums[i] += w * x;
          sums[i + 1] += w * y;
        }
      }
      dots[j] = a + b;
    }
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) store_once(out + i * LANES, sums[i]);
    return;
  }
  for (int64_t c = 0; c < columns; c += LANES) {
    int64_t n = min_of(LANES, columns - c);
    f32x16 sum = {}, held = load_n(atom + c, n);
    for (int64_t j = 0; j < count; j++) {
      f32x16 x = load_n(grad + tokens[j] * d + c, n);
      dots[j] += held * x;
      if (weights[j] != 0) sum += set1(weights[j]) * x;
    }
    store_n(out + c, sum, n);
  }
}

template <typename T>
void gather_sum_backward(const T *values, const int32_t *indices, const T *table, const T *grad, T *d_values,
                         T *d_table, int64_t n, int64_t k, int64_t size, int64_t d, int64_t threads) {
  ByAtom<T> by(values, indices, n, k, size);
  int64_t most = 0;
  for (int64_t a = 0; a < size; a++) most = max_of(most, by.first[a + 1] - by.first[a]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    Scratch products(most * sizeof(f32x16));
    f32x16 *dots = (f32x16 *)products.at;
    int64_t begin = by.part(part, threads, size), end = by.part(part + 1, threads, size);
    populate(d_table + begin * d, (end - begin) * d * sizeof(T));
    for (int64_t a = begin; a < end; a++) {
      int64_t from = by.first[a], count = by.first[a + 1] - from;
      memset(dots, 0, count * sizeof(f32x16));
      for (int64_t j = 0; j < AHEAD; j++)  // of the next atom
        if (from + count < n * k) fetch(grad + by.token[from + count + j] * d, HALF * LANES);
      for (int64_t c = 0; c < d; c += HALF * LANES) {
        int64_t columns = min_of(HALF * LANES, d - c);
        backward_strip(d_table + a * d + c, table + a * d + c, by.weight + from, by.token + from, count, grad + c, d,
                       columns, dots);
      }
      for (int64_t j = 0; j < count; j++) from_float(d_values + by.place[from + j], hsum(dots[j]));
    }
  }
}

}  // namespace

PAUCITY_KERNEL(gather_sum)
(const void *values, const int32_t *indices, const void *table, void *out, int64_t n, int64_t k, int64_t size,
 int64_t d, int64_t dtype, int64_t threads) {
  if (n * d == 0) return 0;
  if (k == 0) {
    memset(out, 0, n * d * (dtype == BF16 ? 2 : 4));
  } else if (dtype == BF16) {
    gather_sum((const bf16 *)values, indices, (const bf16 *)table, (bf16 *)out, n, k, size, d, threads);
  } else {
    gather_sum((const float *)values, indices, (const float *)table, (float *)out, n, k, size, d, threads);
  }
  return 0;
}

PAUCITY_KERNEL(gather_dot)
(const void *x, const int32_t *indices, const void *table, const void *bias, void *out, int64_t n, int64_t k,
 int64_t size, int64_t d, int64_t dtype, int64_t threads) {
  if (n * k == 0) return 0;
  if (dtype == BF16)
    gather_dot((const bf16 *)x, indices, (const bf16 *)table, (const bf16 *)bias, (bf16 *)out, n, k, size, d, threads);
  else
    gather_dot((const float *)x, indices, (const float *)table, (const float *)bias, (float *)out, n, k, size, d,
               threads);
  return 0;
}

PAUCITY_KERNEL(scatter_outer)
(const void *values, const int32_t *indices, const void *x, void *out, int64_t n, int64_t k, int64_t size, int64_t d,
 int64_t dtype, int64_t threads) {
  if (size * d == 0) return 0;
  if (dtype == BF16)
    scatter_outer((const bf16 *)values, indices, (const bf16 *)x, (bf16 *)out, n, k, size, d, threads);
  else
    scatter_outer((const float *)values, indices, (const float *)x, (float *)out, n, k, size, d, threads);
  return 0;
}

PAUCITY_KERNEL(gather_sum_backward)
(const void *values, const int32_t *indices, const void *table, const void *grad, void *d_values, void *d_table,
 int64_t n, int64_t k, int64_t size, int64_t d, int64_t dtype, int64_t threads) {
  if (dtype == BF16)
    gather_sum_backward((const bf16 *)values, indices, (const bf16 *)table, (const bf16 *)grad, (bf16 *)d_values,
                        (bf16 *)d_table, n, k, size, d, threads);
  else
    gather_sum_backward((const float *)values, indices, (const float *)table, (const float *)grad, (float *)d_values,
                        (float *)d_table, n, k, size, d, threads);
  return 0;
}
