// Linears of up to 16 tokens with packed weights of whole blocks: dense ones, or groups along a row in 4 bits. Each
// output is summed in one order, whatever the number of threads.
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

// Blocks of slices: four rows meet four tokens at a time; of fewer rows, each meets ROOM tokens at once. Blocks that fit
// a level-1 cache are read for all of their rows before the next ones.
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
        f32x16 scale = (f32x16)_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32((int)i)), (__m512)scales);
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
  auto run = tokens <= 1 ? group_pairs<1> : tokens <= 2 ? group_pairs<2> : tokens <= 4 ? group_pairs<4> : group_pairs<8>;
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
      for (; i + LANES <= size; i += LANES) store(at + i, (nibbles(groups.codes + (g * size + i) / 2) - zero) * scale);
      for (; i < size; i++)
        from_float(at + i, ((float)(groups.codes[(g * size + i) / 2] >> i % 2 * 4 & 15) - zero) * scale);
    }
  }
  return fits;
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

// Weights (q - zero) * scale in groups along a row, q in 4 bits. Returns 1 where a group's column or a row's offsets are
// out of range.
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
