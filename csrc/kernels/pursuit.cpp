// Matching pursuit of rows. The products of all atoms with the residual are kept up to date with rows of the Gram matrix,
// in the same pass that looks for the largest; the residual itself only gives the value of the atom that was chosen.
#include "../simd.h"

namespace {

constexpr int CHAINS = 4;  // vectors that are compared side by side

struct Best {
  float score;
  int32_t place;
};

// products -= value * row, and the largest product of the result (of equal ones the first). The first pass copies.
template <bool FIRST, bool SIGNED, typename T>
INLINE Best sweep(float *products, const T *row, float value, int64_t m) {
  const f32x16 times = set1(value);
  f32x16 best[CHAINS];
  i32x16 found[CHAINS] = {}, place[CHAINS] = {};
  for (int i = 0; i < CHAINS; i++) {
    best[i] = set1(-__builtin_inff());
    for (int j = 0; j < LANES; j++) place[i][j] = i * LANES + j;
  }
  int64_t c = 0;
  for (; c + CHAINS * LANES <= m; c += CHAINS * LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; i++) {
      float *at = products + c + i * LANES;
      f32x16 v = load(row + c + i * LANES);
      if (!FIRST) v = load(at) - times * v;
      store(at, v);
      const f32x16 score = SIGNED ? abs(v) : v;
      const i32x16 better = score > best[i];
      best[i] = better ? score : best[i];
      found[i] = better ? place[i] : found[i];
      place[i] += CHAINS * LANES;
    }
  }
  Best top = {-__builtin_inff(), 0};
  for (int i = 0; i < CHAINS; i++)
    for (int j = 0; j < LANES; j++)
      if (best[i][j] > top.score || (best[i][j] == top.score && found[i][j] < top.place))
        top.score = best[i][j], top.place = found[i][j];
  for (; c < m; c++) {
    float v = to_float(row[c]);
    if (!FIRST) v = products[c] - value * v;
    products[c] = v;
    const float score = SIGNED ? __builtin_fabsf(v) : v;
    if (score > top.score) top.score = score, top.place = (int32_t)c;
  }
  return top;
}

template <typename T>
INLINE float dot(const float *a, const T *b, int64_t d) {
  f32x16 sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * LANES <= d; c += 2 * LANES) {
    sums[0] += load(a + c) * load(b + c);
    sums[1] += load(a + c + LANES) * load(b + c + LANES);
  }
  for (; c < d; c += LANES) {
    const int64_t n = min_of(LANES, d - c);
    sums[0] += load_n(a + c, n) * load_n(b + c, n);
  }
  return hsum(sums[0] + sums[1]);
}

// left -= value * atom, and its squared norm.
template <typename T>
INLINE float subtract(float *left, const T *atom, float value, int64_t d) {
  const f32x16 times = set1(value);
  f32x16 squares = {};
  for (int64_t c = 0; c < d; c += LANES) {
    const int64_t n = min_of(LANES, d - c);
    const f32x16 v = load_n(left + c, n) - times * load_n(atom + c, n);
    store_n(left + c, v, n);
    squares += v * v;
  }
  return hsum(squares);
}

template <bool SIGNED, typename T>
void pursue(const T *x, const T *atoms, const T *gram, const T *first, T *values, int32_t *indices, T *residual,
            float tolerance, int64_t n, int64_t m, int64_t d, int64_t k, bool stop_on_repeat, int64_t threads) {
#pragma omp parallel num_threads(min_of(threads, n))
  {
    Scratch a((m + LANES) * sizeof(float)), b((d + LANES) * sizeof(float));
    float *products = (float *)a.at, *left = (float *)b.at;
#pragma omp for schedule(dynamic, 16)
    for (int64_t row = 0; row < n; row++) {
      for (int64_t c = 0; c < d; c++) left[c] = to_float(x[row * d + c]);
      Best best = sweep<true, SIGNED>(products, first + row * m, 0.0f, m);
      int64_t step = 0;
      bool ended = false;
      for (; step < k; step++) {
        if (!(best.score > 0) || ended) break;
        if (stop_on_repeat)
          for (int64_t i = 0; i < step; i++) ended |= indices[row * k + i] == best.place;
        const T *atom = atoms + best.place * d;
        const float value = dot(left, atom, d);
        if (SIGNED ? value == 0 : !(value > 0)) break;  // what the products promised was rounding
        from_float(values + row * k + step, value);
        indices[row * k + step] = best.place;
        ended |= subtract(left, atom, value, d) < tolerance * tolerance;
        if (step + 1 < k && !ended) best = sweep<false, SIGNED>(products, gram + (int64_t)best.place * m, value, m);
      }
      for (; step < k; step++) {
        from_float(values + row * k + step, 0.0f);
        indices[row * k + step] = 0;
      }
      for (int64_t c = 0; c < d; c++) from_float(residual + row * d + c, left[c]);
    }
  }
}

template <typename T>
void run(const void *x, const void *atoms, const void *gram, const void *first, void *values, int32_t *indices,
         void *residual, float tolerance, int64_t n, int64_t m, int64_t d, int64_t k, bool by_abs, bool stop_on_repeat,
         int64_t threads) {
  if (by_abs)
    pursue<true>((const T *)x, (const T *)atoms, (const T *)gram, (const T *)first, (T *)values, indices, (T *)residual,
                 tolerance, n, m, d, k, stop_on_repeat, threads);
  else
    pursue<false>((const T *)x, (const T *)atoms, (const T *)gram, (const T *)first, (T *)values, indices,
                  (T *)residual, tolerance, n, m, d, k, stop_on_repeat, threads);
}

}  // namespace

// `first` [n, m] are the products of the rows with the atoms, `gram` [m, m] those of the atoms with each other.
PAUCITY_KERNEL(pursuit)
(const void *x, const void *atoms, const void *gram, const void *first, void *values, int32_t *indices, void *residual,
 float tolerance, int64_t n, int64_t m, int64_t d, int64_t k, int64_t by_abs, int64_t stop_on_repeat, int64_t dtype,
 int64_t threads) {
  if (n == 0) return 0;
  if (dtype == BF16)
    run<bf16>(x, atoms, gram, first, values, indices, residual, tolerance, n, m, d, k, by_abs, stop_on_repeat, threads);
  else
    run<float>(x, atoms, gram, first, values, indices, residual, tolerance, n, m, d, k, by_abs, stop_on_repeat,
               threads);
  return 0;
}
