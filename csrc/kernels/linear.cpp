// Linears of up to 16 tokens over some of the inputs (the weight stored input-major) or for some of the outputs (stored
// row by row): what no token keeps is not read. Each output is summed in one order, whatever the number of threads.
#include "simd.h"

namespace {

constexpr int MOST_TOKENS = 16;
constexpr int64_t ROWS_AT_ONCE = 8;       // inputs whose weights are added to a slice of the outputs in one go
constexpr int64_t SLICE_BYTES = 32 << 10;  // float32 sums of a slice: about a level-1 cache

// What the caller knows of the selection: a threshold, the k highest, or a mask made elsewhere.
enum Mode { THRESHOLD = 0, TOP = 1, GIVEN = 2 };

// A float as an unsigned number of the same order; NaN is below all, -0 equals +0.
INLINE u32x16 ordered(f32x16 s) {
  i32x16 bits = (i32x16)(s + 0.0f);
  bits = (bits < 0) ? (bits ^ 0x7fffffff) : bits;
  u32x16 key = (u32x16)bits ^ 0x80000000u;
  return (s == s) ? key : u32x16{};
}

template <typename E>
INLINE f32x16 score_at(const E *x, const float *norm, int64_t n) {
  f32x16 s = abs(load_n(x, n));
  return norm ? s * load_n(norm, n) : s;
}

// mask[j] = whether token x keeps input j. `keys` has room for size + 16.
template <typename E>
void select(const E *x, const float *norm, int64_t size, Mode mode, float threshold, int64_t k, uint32_t *keys,
            uint8_t *mask) {
  if (mode == THRESHOLD) {
    for (int64_t j = 0; j < size; j += LANES) {
      int64_t n = min_of(LANES, size - j);
      i32x16 above = score_at(x + j, norm ? norm + j : nullptr, n) > threshold;
      for (int64_t i = 0; i < n; i++) mask[j + i] = above[i] & 1;
    }
    return;
  }
  for (int64_t j = 0; j < size; j += LANES) {
    u32x16 key = ordered(score_at(x + j, norm ? norm + j : nullptr, min_of(LANES, size - j)));
    memcpy(keys + j, &key, sizeof key);
  }
  // The k-th highest key, bit by bit: the highest number that k keys reach.
  uint32_t lowest = 0;
  for (int bit = 31; bit >= 0 && k > 0; bit--) {
    uint32_t trial = lowest | 1u << bit;
    i32x16 reached = {};
    int64_t whole = size / LANES * LANES, count = 0;
    for (int64_t j = 0; j < whole; j += LANES) {
      u32x16 key;
      memcpy(&key, keys + j, sizeof key);
      reached -= key >= trial;
    }
    for (int i = 0; i < LANES; i++) count += reached[i];
    for (int64_t j = whole; j < size; j++) count += keys[j] >= trial;
    if (count >= k) lowest = trial;
  }
  int64_t room = k;
  for (int64_t j = 0; j < size; j++) room -= keys[j] > lowest;
  for (int64_t j = 0; j < size; j++) {
    bool tied = keys[j] == lowest && room > 0;
    room -= tied;
    mask[j] = k > 0 && (keys[j] > lowest || tied);
  }
}

// The positions that any token keeps, ascending.
int64_t any_kept(const uint8_t *mask, int64_t tokens, int64_t size, int32_t *kept) {
  int64_t count = 0;
  for (int64_t j = 0; j < size; j++) {
    uint8_t any = 0;
    for (int64_t t = 0; t < tokens; t++) any |= mask[t * size + j];
    kept[count] = (int32_t)j;
    count += any != 0;
  }
  return count;
}

// sums[t][0 .. width) += sum over N inputs of xs[r][t] * rows[r][0 .. width); the next inputs' weights are fetched.
template <int N, typename E>
INLINE void add_rows(const E *const *rows, const E *const *next, const float *xs, int64_t tokens, float *sums,
                     int64_t pitch, int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(E);
  int64_t c = 0;
  for (; c + LINE <= width; c += LINE) {
    if (next)
      for (int r = 0; r < N; r++) __builtin_prefetch(next[r] + c, 0, 2);
    for (int64_t part = 0; part < LINE; part += LANES) {
      f32x16 w[N];
      for (int r = 0; r < N; r++) w[r] = load(rows[r] + c + part);
      for (int64_t t = 0; t < tokens; t++) {
        float *at = sums + t * pitch + c + part;
        f32x16 sum = load(at);
        for (int r = 0; r < N; r++) sum += w[r] * xs[r * MOST_TOKENS + t];
        store(at, sum);
      }
    }
  }
  for (; c < width; c += LANES) {
    int64_t n = min_of(LANES, width - c);
    f32x16 w[N];
    for (int r = 0; r < N; r++) w[r] = load_n(rows[r] + c, n);
    for (int64_t t = 0; t < tokens; t++) {
      float *at = sums + t * pitch + c;
      f32x16 sum = load_n(at, n);
      for (int r = 0; r < N; r++) sum += w[r] * xs[r * MOST_TOKENS + t];
      store_n(at, sum, n);
    }
  }
}

// Outputs [from, to) of all tokens.
template <typename E>
void input_slice(const E *weight, int64_t ld, const int32_t *kept, int64_t count, const float *xs, const E *bias, E *y,
                 int64_t tokens, int64_t out, int64_t from, int64_t to, float *sums) {
  int64_t width = to - from, pitch = (width + LANES - 1) / LANES * LANES, done = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < width; c += LANES) {
      int64_t n = min_of(LANES, width - c);
      store(sums + t * pitch + c, bias ? load_n(bias + from + c, n) : f32x16{});
    }
  const E *rows[ROWS_AT_ONCE], *next[ROWS_AT_ONCE];
  for (; done + ROWS_AT_ONCE <= count; done += ROWS_AT_ONCE) {
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
      rows[r] = weight + kept[done + r] * ld + from;
      next[r] = weight + kept[min_of(done + ROWS_AT_ONCE + r, count - 1)] * ld + from;
    }
    if (tokens == 1)
      add_rows<ROWS_AT_ONCE>(rows, next, xs + done * MOST_TOKENS, 1, sums, pitch, width);
    else
      add_rows<ROWS_AT_ONCE>(rows, next, xs + done * MOST_TOKENS, tokens, sums, pitch, width);
  }
  for (; done < count; done++) {
    rows[0] = weight + kept[done] * ld + from;
    add_rows<1, E>(rows, nullptr, xs + done * MOST_TOKENS, tokens, sums, pitch, width);
  }
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < width; c += LANES)
      store_n(y + t * out + from + c, load(sums + t * pitch + c), min_of(LANES, width - c));
}

template <typename E>
int input_linear(const E *x, const E *weight, const E *bias, const float *norm, E *y, uint8_t *mask, int64_t tokens,
                 int64_t in, int64_t out, int64_t ld, Mode mode, float threshold, int64_t k, int64_t max_kept,
                 int64_t threads) {
  if (mode != GIVEN) {
#pragma omp parallel for schedule(static, 1) num_threads(min_of(threads, tokens)) if (tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
      Scratch keys(mode == TOP ? (in + LANES) * sizeof(uint32_t) : 0);
      select(x + t * in, norm, in, mode, threshold, k, (uint32_t *)keys.at, mask + t * in);
    }
  }
  Scratch kept_at((in + 1) * sizeof(int32_t));
  int32_t *kept = (int32_t *)kept_at.at;
  int64_t count = any_kept(mask, tokens, in, kept);
  if (count > max_kept) return 1;
  Scratch xs_at(count * MOST_TOKENS * sizeof(float));
  float *xs = (float *)xs_at.at;
  for (int64_t i = 0; i < count; i++)
    for (int64_t t = 0; t < tokens; t++) {
      int64_t at = t * in + kept[i];
      xs[i * MOST_TOKENS + t] = mask[at] ? to_float(x[at]) : 0;
    }
  int64_t share = ceil_div(ceil_div(out, threads), 64) * 64;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    int64_t from = min_of(part * share, out), to = min_of(from + share, out);
    int64_t slices = ceil_div(tokens * (to - from) * (int64_t)sizeof(float), SLICE_BYTES);
    int64_t step = max_of(256, ceil_div(ceil_div(to - from, max_of(slices, 1)), 64) * 64);
    Scratch sums(tokens * step * sizeof(float));
    for (int64_t at = from; at < to; at += step)
      input_slice(weight, ld, kept, count, xs, bias, y, tokens, out, at, min_of(at + step, to), (float *)sums.at);
  }
  return 0;
}

// Products of one row of a weight with N tokens, each summed by itself. Without dpbf16ps, x is float32.
#if defined(__AVX512BF16__)
INLINE f32x16 dp(f32x16 sum, __m512i a, __m512i b) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

template <int N>
INLINE void row_dots(const bf16 *row, const bf16 *next, const bf16 *x, int64_t pitch, int64_t size, float *dots) {
  f32x16 sums[N][2] = {};
  int64_t c = 0;
  for (; c + 64 <= size; c += 64) {
    __builtin_prefetch(next + c, 0, 2);
    __builtin_prefetch(next + c + 32, 0, 2);
    __m512i low = _mm512_loadu_si512(row + c), high = _mm512_loadu_si512(row + c + 32);
    for (int t = 0; t < N; t++) {
      sums[t][0] = dp(sums[t][0], low, _mm512_loadu_si512(x + t * pitch + c));
      sums[t][1] = dp(sums[t][1], high, _mm512_loadu_si512(x + t * pitch + c + 32));
    }
  }
  for (; c < size; c += 32) {
    __mmask32 some = size - c >= 32 ? ~0u : (1u << (size - c)) - 1;
    __m512i part = _mm512_maskz_loadu_epi16(some, row + c);
    for (int t = 0; t < N; t++)
      sums[t][0] = dp(sums[t][0], part, _mm512_maskz_loadu_epi16(some, x + t * pitch + c));
  }
  for (int t = 0; t < N; t++) dots[t] = hsum(sums[t][0] + sums[t][1]);
}
#endif

template <int N, typename E>
INLINE void row_dots(const E *row, const E *next, const float *x, int64_t pitch, int64_t size, float *dots) {
  constexpr int64_t LINE = 64 / sizeof(E);
  f32x16 sums[N][2] = {};
  int64_t c = 0;
  for (; c + 2 * LANES <= size; c += 2 * LANES) {
    for (int64_t at = 0; at < 2 * LANES; at += LINE) __builtin_prefetch(next + c + at, 0, 2);
    f32x16 low = load(row + c), high = load(row + c + LANES);
    for (int t = 0; t < N; t++) {
      sums[t][0] += low * load(x + t * pitch + c);
      sums[t][1] += high * load(x + t * pitch + c + LANES);
    }
  }
  for (; c < size; c += LANES) {
    int64_t n = min_of(LANES, size - c);
    f32x16 part = load_n(row + c, n);
    for (int t = 0; t < N; t++) sums[t][0] += part * load_n(x + t * pitch + c, n);
  }
  for (int t = 0; t < N; t++) dots[t] = hsum(sums[t][0] + sums[t][1]);
}

template <typename E, typename X>
int output_linear(const X *x, const E *weight, const uint8_t *rows, const E *bias, E *y, int64_t tokens, int64_t in,
                  int64_t out, int64_t ld, int64_t max_kept, int64_t threads) {
  Scratch kept_at((out + 1) * sizeof(int32_t));
  int32_t *kept = (int32_t *)kept_at.at;
  int64_t count = any_kept(rows, tokens, out, kept);
  if (count > max_kept) return 1;
  memset(y, 0, tokens * out * sizeof(E));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    int64_t row = kept[i];
    const E *at = weight + row * ld, *next = weight + kept[min_of(i + 1, count - 1)] * ld;
    float dots[MOST_TOKENS];
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) row_dots<4>(at, next, x + t * in, in, in, dots + t);
    for (; t < tokens; t++) row_dots<1>(at, next, x + t * in, in, in, dots + t);
    for (t = 0; t < tokens; t++)
      if (rows[t * out + row]) from_float(y + t * out + row, dots[t] + (bias ? to_float(bias[row]) : 0));
  }
  return 0;
}

}  // namespace

// Returns 1 where any token keeps more than max_kept inputs between them: mask is written then, y is not.
PAUCITY_KERNEL(sparse_input)
(const void *x, const void *weight, const void *bias, const float *norm, void *y, uint8_t *mask, int64_t tokens,
 int64_t in, int64_t out, int64_t ld, int64_t mode, float threshold, int64_t k, int64_t max_kept, int64_t dtype,
 int64_t threads) {
  if (dtype == BF16)
    return input_linear((const bf16 *)x, (const bf16 *)weight, (const bf16 *)bias, norm, (bf16 *)y, mask, tokens, in,
                        out, ld, (Mode)mode, threshold, k, max_kept, threads);
  return input_linear((const float *)x, (const float *)weight, (const float *)bias, norm, (float *)y, mask, tokens, in,
                      out, ld, (Mode)mode, threshold, k, max_kept, threads);
}

// Returns 1 where the tokens keep more than max_kept rows between them: y is not written then.
PAUCITY_KERNEL(sparse_output)
(const void *x, const void *weight, const uint8_t *rows, const void *bias, void *y, int64_t tokens, int64_t in,
 int64_t out, int64_t ld, int64_t max_kept, int64_t dtype, int64_t threads) {
  if (dtype == F32)
    return output_linear((const float *)x, (const float *)weight, rows, (const float *)bias, (float *)y, tokens, in,
                         out, ld, max_kept, threads);
#if defined(__AVX512BF16__)
  const bf16 *wide = (const bf16 *)x;
#else
  Scratch wide_at(tokens * in * sizeof(float));
  float *wide = (float *)wide_at.at;
  for (int64_t i = 0; i < tokens * in; i++) wide[i] = to_float(((const bf16 *)x)[i]);
#endif
  return output_linear(wide, (const bf16 *)weight, rows, (const bf16 *)bias, (bf16 *)y, tokens, in, out, ld, max_kept,
                       threads);
}
