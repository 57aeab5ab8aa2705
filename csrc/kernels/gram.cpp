// X^T X of inputs X [tokens, size], added to a matrix in float32; of it only what lies on and left of the diagonal.
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

}  // namespace

// `stride` floats lie from one row of `gram` to the next: at least `size`, rounded up to a multiple of 16.
PAUCITY_KERNEL(gram)
(const void *x, float *gram, int64_t tokens, int64_t size, int64_t stride, int64_t dtype, int64_t threads) {
  if (dtype == F32) return run((const float *)x, gram, tokens, size, stride, threads);
  return run((const bf16 *)x, gram, tokens, size, stride, threads);
}
