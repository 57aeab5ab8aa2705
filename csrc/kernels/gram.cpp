// X^T X of inputs X [tokens, size], added to a matrix in float32; of it only what lies on and left of the diagonal, or the
// diagonal alone, in float64.
#include "../pack.h"

namespace {

constexpr int64_t CHUNK = 512;  // tokens that are laid out at a time
constexpr int64_t STRIP = 48;   // rows of the result that a thread takes at a time

template <class T>
int run(const T *x, float *gram, int64_t tokens, int64_t size, int64_t stride, int64_t threads) {
  typedef typename Element<T>::type E;
  constexpr int64_t PER = Per<E>::elements;
  const int64_t width = padded(size), most = in_elements<E>(min_of(CHUNK, tokens));
  Scratch laid(most * width * sizeof(E)), nothing(size * sizeof(T));
  E *packed = (E *)laid.at;
  memset(nothing.at, 0, size * sizeof(T));
  for (int64_t start = 0; start < tokens; start += CHUNK) {
    const int64_t count = min_of(CHUNK, tokens - start), depth = in_elements<E>(count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < depth; k++) {
        const T *rows[2] = {x + (start + k * PER) * size, x + (start + k * PER + 1) * size};
        lay_down(rows, min_of(PER, count - k * PER), size, (const T *)nothing.at, packed + k * width);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t strip = 0; strip < ceil_div(size, STRIP); strip++) {
        // The last strips are the longest: they go first.
        const int64_t first = (ceil_div(size, STRIP) - 1 - strip) * STRIP, rows = min_of(STRIP, size - first);
        const E *across[CHUNK];
        float *to[STRIP];
        for (int64_t k = 0; k < depth; k++) across[k] = packed + k * width + first;
        for (int64_t i = 0; i < rows; i++) to[i] = gram + (first + i) * stride;
        product<true, ADD>(across, rows, depth, packed, width, 0, padded(first + rows), to);
      }
    }
  }
  return 0;
}

// Threads share the columns. Squares of a few hundred rows are summed in float32, these sums in float64.
template <class T>
int run_squares(const T *x, double *squares, int64_t tokens, int64_t size, int64_t threads) {
  const int64_t share = ceil_div(ceil_div(size, LANES), threads) * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < size; first += share) {
    const int64_t count = min_of(share, size - first);
    Scratch sums(padded(count) * sizeof(float));
    float *sum = (float *)sums.at;
    for (int64_t start = 0; start < tokens; start += CHUNK) {
      memset(sum, 0, padded(count) * sizeof(float));
      for (int64_t row = start; row < min_of(start + CHUNK, tokens); row++) {
        const T *at = x + row * size + first;
        int64_t c = 0;
        for (; c + LANES <= count; c += LANES) {
          const f32x16 v = load(at + c);
          store(sum + c, load(sum + c) + v * v);
        }
        if (c < count) {
          const f32x16 v = load_n(at + c, count - c);
          store(sum + c, load(sum + c) + v * v);
        }
      }
      for (int64_t c = 0; c < count; c++) squares[first + c] += sum[c];
    }
  }
  return 0;
}

}  // namespace

// `stride` floats lie from one row of `gram` to the next: at least `size`, rounded up to a multiple of 16.
PAUCITY_KERNEL(gram)
(const void *x, float *gram, int64_t tokens, int64_t size, int64_t stride, int64_t dtype, int64_t threads) {
  if (dtype == F32) return run((const float *)x, gram, tokens, size, stride, threads);
  return run((const bf16 *)x, gram, tokens, size, stride, threads);
}

PAUCITY_KERNEL(squares)
(const void *x, double *squares, int64_t tokens, int64_t size, int64_t dtype, int64_t threads) {
  if (dtype == F32) return run_squares((const float *)x, squares, tokens, size, threads);
  return run_squares((const bf16 *)x, squares, tokens, size, threads);
}
