// Linears of up to 16 tokens with packed weights of groups along a row, in 4 bits. Each output is summed in one order,
// whatever the number of threads.
#include "slices.h"

namespace {

// The 16 numbers of 4 bits in 8 bytes, the low half of a byte first.
INLINE f32x16 nibbles(const uint8_t *p) {
  uint32_t halves[2];
  memcpy(halves, p, 8);
  const u32x16 shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
#if defined(__AVX512F__)
  const __m512i which = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  u32x16 both = (u32x16)_mm512_permutexvar_epi32(which, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)p)));
#else
  uint32_t a = halves[0], b = halves[1];
  u32x16 both = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
#endif
  return __builtin_convertvector((i32x16)((both >> shifts) & 15), f32x16);
}

// Groups of `size` weights (q - zero) * scale of one row, rounded to E; `size` is a multiple of 16.
template <typename E>
struct Groups {
  typedef Slice<E> S;
  const uint8_t *codes, *zeros;
  const E *scales;
  int64_t size;
  __attribute__((always_inline)) typename S::W at(int64_t b, int64_t, int64_t slice) const {
    f32x16 q = nibbles(codes + (b * size + slice * LANES) / 2);
    return S::of((q - (float)zeros[b]) * to_float(scales[b]));
  }
};

// One row of one group, any even size, as floats.
template <typename E>
INLINE void group_row(float *to, const uint8_t *codes, float zero, float scale, int64_t size) {
  for (int64_t i = 0; i < size; i++) {
    E w;
    from_float(&w, ((float)(codes[i / 2] >> i % 2 * 4 & 15) - zero) * scale);
    to[i] = to_float(w);
  }
}

// Groups that are no multiple of 16: one after the other through memory.
template <typename E>
bool small_groups(const E *x, Groups<E> groups, Columns columns, int64_t num_groups, const int32_t *offsets,
                  const E *bias, E *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  int64_t size = groups.size;
  bool fits = true;
#pragma omp parallel num_threads(threads) reduction(&& : fits)
  {
    Scratch w_at(size * sizeof(float));
    float *w = (float *)w_at.at;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      if (!within(columns, offsets[row], offsets[row + 1], num_groups, cols / size)) {
        fits = false;
        continue;
      }
      f32x16 sums[16] = {};
      for (int64_t g = offsets[row]; g < offsets[row + 1]; g++) {
        group_row<E>(w, groups.codes + g * size / 2, groups.zeros[g], to_float(groups.scales[g]), size);
        const E *at = x + columns.at(g) * size;
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t i = 0; i < size; i += LANES)
            sums[t] += load_n(w + i, min_of(LANES, size - i)) * load_n(at + t * cols + i, min_of(LANES, size - i));
      }
      float b = bias ? to_float(bias[row]) : 0;
      for (int64_t t = 0; t < tokens; t++) from_float(y + t * rows + row, hsum(sums[t]) + b);
    }
  }
  return fits;
}

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
// Groups of 16 in bfloat16 for T tokens, two groups at a time: a table turns q into q - zero, which is exact, and the
// sum of a group's products is scaled (its weights are not rounded to bfloat16, as unpacked ones are).
template <int T>
bool group_pairs(const bf16 *x, Groups<bf16> groups, Columns columns, int64_t num_groups, const int32_t *offsets,
                 const bf16 *bias, bf16 *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  Scratch x_at(T * cols * sizeof(bf16));
  bf16 *xs = (bf16 *)x_at.at;
  lay_slices<bf16>(xs, x, tokens, T, cols);
  bf16 tables[16][16];
  for (int z = 0; z < 16; z++)
    for (int q = 0; q < 16; q++) from_float(&tables[z][q], (float)(q - z));
  auto half = [](const bf16 *p) __attribute__((always_inline)) { return _mm256_loadu_si256((const __m256i *)p); };
  const __m512i low = _mm512_set1_epi32(0x000f000f), second = _mm512_set_epi64(
      0x0010001000100010, 0x0010001000100010, 0x0010001000100010, 0x0010001000100010, 0, 0, 0, 0);
  const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t row = 0; row < rows; row++) {
    int64_t to = offsets[row + 1];
    if (!within(columns, offsets[row], to, num_groups, cols / LANES)) {
      fits = false;
      continue;
    }
    f32x16 sums[2][T] = {};
    for (int64_t first = offsets[row]; first < to; first += LANES) {
      int64_t n = min_of(LANES, to - first);
      f32x16 scales = load_n(groups.scales + first, n);
      // `pair`: both groups are there.
      auto add = [&](int64_t i, bool pair) __attribute__((always_inline)) {
        int64_t g = first + i, h = pair ? g + 1 : g;
        const __m128i *at = (const __m128i *)(groups.codes + g * 8);
        __m512i codes = _mm512_cvtepu8_epi32(pair ? _mm_loadu_si128(at) : _mm_loadl_epi64(at));
        __m512i q = (((codes | _mm512_slli_epi32(codes, 12)) & low) | second);
        __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half(tables[groups.zeros[g] & 15])),
                                           half(tables[groups.zeros[h] & 15]), 1);
        __m512bh w = (__m512bh)_mm512_permutexvar_epi16(q, table);
        __m512i which = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        f32x16 scale = (f32x16)_mm512_permutexvar_ps(which, (__m512)scales);
        const bf16 *a = xs + columns.at(g) * T * LANES, *b = xs + columns.at(h) * T * LANES;
        for (int t = 0; t < T; t++) {
          __m512i in = _mm512_zextsi256_si512(half(a + t * LANES));
          if (pair) in = _mm512_inserti64x4(in, half(b + t * LANES), 1);
          sums[i / 2 % 2][t] += (f32x16)_mm512_dpbf16_ps(_mm512_setzero_ps(), w, (__m512bh)in) * scale;
        }
      };
      if (n == LANES) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < LANES; i += 2) add(i, true);
        continue;
      }
      int64_t i = 0;
      for (; i + 2 <= n; i += 2) add(i, true);
      if (i < n) add(i, false);
    }
    float b = bias ? to_float(bias[row]) : 0;
    for (int64_t t = 0; t < tokens; t++) from_float(y + t * rows + row, hsum(sums[0][t] + sums[1][t]) + b);
  }
  return fits;
}

INLINE bool few_tokens(const bf16 *x, Groups<bf16> groups, Columns columns, int64_t num_groups, const int32_t *offsets,
                       const bf16 *bias, bf16 *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  auto run = tokens <= 1   ? group_pairs<1>
             : tokens <= 2 ? group_pairs<2>
             : tokens <= 4 ? group_pairs<4>
                           : group_pairs<8>;
  return run(x, groups, columns, num_groups, offsets, bias, y, tokens, rows, cols, threads);
}
#endif

template <typename E>
bool groups_linear(const E *x, Groups<E> groups, Columns columns, int64_t num_groups, const int32_t *offsets,
                   const E *bias, E *y, int64_t tokens, int64_t rows, int64_t cols, int64_t threads) {
  if (groups.size % LANES)
    return small_groups(x, groups, columns, num_groups, offsets, bias, y, tokens, rows, cols, threads);
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (sizeof(E) == 2)
    if (groups.size == LANES && tokens <= 8)
      return few_tokens(x, groups, columns, num_groups, offsets, bias, y, tokens, rows, cols, threads);
#endif
  auto run = tokens <= 1    ? slices_linear<1, E, Groups<E>>
             : tokens <= 2  ? slices_linear<2, E, Groups<E>>
             : tokens <= 4  ? slices_linear<4, E, Groups<E>>
             : tokens <= 8  ? slices_linear<8, E, Groups<E>>
             : tokens <= 12 ? slices_linear<12, E, Groups<E>>
                            : slices_linear<16, E, Groups<E>>;
  return run(x, groups, columns, num_groups, offsets, bias, y, tokens, rows, cols, 1, groups.size, threads);
}

template <typename E>
bool unpack_groups(Groups<E> groups, Columns columns, int64_t num_groups, const int32_t *offsets, E *out, int64_t cols,
                   int64_t first, int64_t last, int64_t threads) {
  int64_t size = groups.size;
  bool fits = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : fits)
  for (int64_t row = first; row < last; row++) {
    E *here = out + (row - first) * cols;
    memset((void *)here, 0, cols * sizeof(E));
    if (!within(columns, offsets[row], offsets[row + 1], num_groups, cols / size)) {
      fits = false;
      continue;
    }
    for (int64_t g = offsets[row]; g < offsets[row + 1]; g++) {
      E *at = here + columns.at(g) * size;
      float zero = groups.zeros[g], scale = to_float(groups.scales[g]);
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES)
        store(at + i, (nibbles(groups.codes + (g * size + i) / 2) - zero) * scale);
      for (; i < size; i++)
        from_float(at + i, ((float)(groups.codes[(g * size + i) / 2] >> i % 2 * 4 & 15) - zero) * scale);
    }
  }
  return fits;
}

}  // namespace

// Weights (q - zero) * scale in groups along a row, q in 4 bits. Returns 1 where a group's column or a row's offsets
// are out of range.
PAUCITY_KERNEL(packed_groups)
(const void *x, const uint8_t *codes, const void *scales, const uint8_t *zeros, const void *columns,
 int64_t wide_columns, int64_t num_groups, const int32_t *offsets, const void *bias, void *y, int64_t tokens,
 int64_t rows, int64_t cols, int64_t size, int64_t dtype, int64_t threads) {
  Columns at = columns_of(columns, wide_columns);
  if (dtype == BF16)
    return !groups_linear((const bf16 *)x, Groups<bf16>{codes, zeros, (const bf16 *)scales, size}, at, num_groups,
                          offsets, (const bf16 *)bias, (bf16 *)y, tokens, rows, cols, threads);
  return !groups_linear((const float *)x, Groups<float>{codes, zeros, (const float *)scales, size}, at, num_groups,
                        offsets, (const float *)bias, (float *)y, tokens, rows, cols, threads);
}

// Rows [first, last), dense; returns as packed_groups.
PAUCITY_KERNEL(unpack_group_rows)
(const uint8_t *codes, const void *scales, const uint8_t *zeros, const void *columns, int64_t wide_columns,
 int64_t num_groups, const int32_t *offsets, void *out, int64_t cols, int64_t size, int64_t first, int64_t last,
 int64_t dtype, int64_t threads) {
  Columns at = columns_of(columns, wide_columns);
  if (dtype == BF16)
    return !unpack_groups(Groups<bf16>{codes, zeros, (const bf16 *)scales, size}, at, num_groups, offsets, (bf16 *)out,
                          cols, first, last, threads);
  return !unpack_groups(Groups<float>{codes, zeros, (const float *)scales, size}, at, num_groups, offsets, (float *)out,
                        cols, first, last, threads);
}
