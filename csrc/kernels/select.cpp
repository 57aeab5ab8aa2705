// Selection within rows: the k best entries in order, and the entries above a threshold in order of position.
#include "../simd.h"

namespace {

// Unsigned integers in the order of the scores: NaN lowest, -0 as +0.
INLINE u32x16 rank(f32x16 x, bool by_abs) {
  if (by_abs) x = abs(x);
  i32x16 bits = (i32x16)(x + 0.0f);
  u32x16 key = (u32x16)(bits ^ ((bits >> 31) | (int32_t)0x80000000));
  return (x == x) ? key : u32x16{};
}

// Appends to keys and places the entries with a key of at least `least`; the buffers have room for a whole vector more.
INLINE int64_t append(uint32_t *keys, int32_t *places, int64_t count, u32x16 key, i32x16 place, uint32_t least,
                      int64_t n) {
#if defined(__AVX512F__)
  __mmask16 valid = (__mmask16)((1u << n) - 1);
  __mmask16 kept = _mm512_mask_cmpge_epu32_mask(valid, (__m512i)key, _mm512_set1_epi32((int)least));
  // From register to register: a compressing store to memory is slow on some processors.
  _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(kept, (__m512i)key));
  _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(kept, (__m512i)place));
  return count + __builtin_popcount(kept);
#else
  for (int i = 0; i < n; i++) {
    keys[count] = key[i];
    places[count] = place[i];
    count += key[i] >= least;
  }
  return count;
#endif
}

INLINE int64_t count_at_least(const uint32_t *keys, int64_t n, uint32_t least) {
  int64_t count = 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi32((int)least);
  for (int64_t i = 0; i < n; i += LANES) {
    __mmask16 valid = (__mmask16)((1u << min_of(LANES, n - i)) - 1);
    count += __builtin_popcount(_mm512_mask_cmpge_epu32_mask(valid, _mm512_loadu_si512(keys + i), low));
  }
#else
  for (int64_t i = 0; i < n; i++) count += keys[i] >= least;
#endif
  return count;
}

// The highest key, of its first `bits` bits, that at least `wanted` of the keys reach.
INLINE uint32_t highest_reached_by(const uint32_t *keys, int64_t n, int64_t wanted, int bits) {
  uint32_t least = 0;
  for (int bit = 31; bit >= 32 - bits; bit--) {
    uint32_t next = least | (1u << bit);
    if (count_at_least(keys, n, next) >= wanted) least = next;
  }
  return least;
}

struct Entry {
  uint32_t key;  // inverted: ascending is best first
  int32_t place;
};

// Stable, best first; the result is in `entries`, `other` is scratch.
void sort_entries(Entry *entries, Entry *other, int64_t n) {
  if (n <= 40) {
    for (int64_t i = 1; i < n; i++) {
      Entry moved = entries[i];
      int64_t to = i;
      for (; to > 0 && entries[to - 1].key > moved.key; to--) entries[to] = entries[to - 1];
      entries[to] = moved;
    }
    return;
  }
  uint32_t counts[4][256];
  memset(counts, 0, sizeof counts);
  for (int64_t i = 0; i < n; i++)
    for (int digit = 0; digit < 4; digit++) counts[digit][entries[i].key >> (8 * digit) & 255]++;
  Entry *from = entries, *to = other;
  for (int digit = 0; digit < 4; digit++) {
    if (counts[digit][from[0].key >> (8 * digit) & 255] == n) continue;  // all alike
    uint32_t before = 0;
    for (int value = 0; value < 256; value++) {
      uint32_t here = counts[digit][value];
      counts[digit][value] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; i++) to[counts[digit][from[i].key >> (8 * digit) & 255]++] = from[i];
    Entry *swapped = from;
    from = to;
    to = swapped;
  }
  if (from != entries) memcpy(entries, from, n * sizeof(Entry));
}

constexpr int64_t SAMPLE = 1024;

template <typename T>
int64_t candidates(const T *x, int64_t n, bool by_abs, uint32_t least, uint32_t *keys, int32_t *places) {
  i32x16 place;
  for (int i = 0; i < LANES; i++) place[i] = i;
  int64_t count = 0, c = 0;
  for (; c + LANES <= n; c += LANES, place += LANES)
    count = append(keys, places, count, rank(load(x + c), by_abs), place, least, LANES);
  return c < n ? append(keys, places, count, rank(load_n(x + c, n - c), by_abs), place, least, n - c) : count;
}

// A guess of a key that slightly more than k entries of the row reach, from a sample at even distances.
template <typename T>
uint32_t guess(const T *x, int64_t n, int64_t k, bool by_abs, uint32_t *keys) {
  const int64_t sample = min_of(SAMPLE, n / (4 * LANES) * LANES);
  if (sample < 64 || k > n / 2) return 0;
  float picked[LANES];
  for (int64_t i = 0; i < sample; i += LANES) {
    for (int64_t j = 0; j < LANES; j++) picked[j] = to_float(x[(i + j) * n / sample]);
    u32x16 key = rank(load(picked), by_abs);
    memcpy(keys + i, &key, sizeof key);
  }
  double expected = (double)k * sample / n;
  int64_t wanted = (int64_t)(expected + 3 * __builtin_sqrt(expected) + 3);
  return wanted >= sample ? 0 : highest_reached_by(keys, sample, wanted, 20);
}

template <typename T>
void topk(const T *x, T *values, int32_t *indices, int64_t rows, int64_t n, int64_t k, bool by_abs, int64_t threads) {
#pragma omp parallel num_threads(min_of(threads, rows))
  {
    int64_t room = max_of(n, SAMPLE) + LANES;
    Scratch a(room * 4), b(room * 4), c(room * sizeof(Entry)), d(room * sizeof(Entry));
    uint32_t *keys = (uint32_t *)a.at;
    int32_t *places = (int32_t *)b.at;
    Entry *entries = (Entry *)c.at;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const T *at = x + row * n;
      int64_t count = candidates(at, n, by_abs, guess(at, n, k, by_abs, keys), keys, places);
      if (count < k) count = candidates(at, n, by_abs, 0, keys, places);  // the guess was too high
      int64_t used = count;
      if (count > 2 * k) {  // keep exactly k: all above the k-th key, and the first ones that equal it
        uint32_t least = highest_reached_by(keys, count, k, 32);
        int64_t equal = k - (least == 0xffffffff ? 0 : count_at_least(keys, count, least + 1));
        used = 0;
        for (int64_t i = 0; i < count; i++) {
          bool tied = keys[i] == least, kept = keys[i] > least || (tied && equal > 0);
          equal -= tied && equal > 0;
          keys[used] = keys[i];
          places[used] = places[i];
          used += kept;
        }
      }
      for (int64_t i = 0; i < used; i++) entries[i] = Entry{~keys[i], places[i]};
      sort_entries(entries, (Entry *)d.at, used);
      for (int64_t i = 0; i < k; i++) {
        indices[row * k + i] = entries[i].place;
        values[row * k + i] = at[entries[i].place];
      }
    }
  }
}

constexpr int64_t SHORT = 32;

// The mask of the k best of a short row: each pair is compared once, and who loses to k others goes.
template <typename T>
INLINE void mask_short(const T *x, uint8_t *mask, int64_t n, int64_t k, bool by_abs) {
  uint32_t keys[SHORT];
  uint8_t lost[SHORT] = {};
  for (int64_t c = 0; c < n; c += LANES) {
    u32x16 key = rank(load_n(x + c, min_of(LANES, n - c)), by_abs);
    memcpy(keys + c, &key, sizeof key);
  }
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = i + 1; j < n; j++) {
      const bool later = keys[j] > keys[i];
      lost[i] += later;
      lost[j] += !later;
    }
  for (int64_t i = 0; i < n; i++) mask[i] = lost[i] < k;
}

// The mask of the k best of a row that is longer.
template <typename T>
INLINE void mask_long(const T *x, uint8_t *mask, int64_t n, int64_t k, bool by_abs, uint32_t *keys) {
  for (int64_t c = 0; c < n; c += LANES) {
    u32x16 key = rank(load_n(x + c, min_of(LANES, n - c)), by_abs);
    memcpy(keys + c, &key, sizeof key);
  }
  const uint32_t least = highest_reached_by(keys, n, k, 32);
  int64_t room = k - (least == 0xffffffff ? 0 : count_at_least(keys, n, least + 1));
  const bool all = count_at_least(keys, n, least) == k;
  if (all) {
    for (int64_t i = 0; i < n; i++) mask[i] = keys[i] >= least;
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    const bool tied = keys[i] == least && room > 0;
    mask[i] = keys[i] > least || tied;
    room -= tied;
  }
}

template <typename T>
void topk_mask(const T *x, uint8_t *mask, int64_t rows, int64_t n, int64_t k, bool by_abs, int64_t threads) {
#pragma omp parallel num_threads(min_of(threads, rows))
  {
    Scratch keys((n + LANES) * 4);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const T *at = x + row * n;
      if (n == 4)  // unrolled: the pattern that hardware knows
        mask_short(at, mask + row * n, 4, k, by_abs);
      else if (n <= SHORT)
        mask_short(at, mask + row * n, n, k, by_abs);
      else
        mask_long(at, mask + row * n, n, k, by_abs, (uint32_t *)keys.at);
    }
  }
}

// mean + deviations * standard deviation of a row, rounded to its type. The sums are shifted by the mean of the first
// entries, so that a mean far from 0 costs no accuracy.
template <typename T>
float statistical_threshold(const T *x, int64_t n, float deviations) {
  if (deviations == -__builtin_inff()) return deviations;
  float shift = hsum(load_n(x, min_of(LANES, n))) / min_of(LANES, n);
  if (!(shift - shift == 0)) shift = 0;
  f32x16 sums[4] = {}, squares[4] = {};
  int64_t c = 0;
  for (; c + 4 * LANES <= n; c += 4 * LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      f32x16 away = load(x + c + i * LANES) - shift;
      sums[i] += away;
      squares[i] += away * away;
    }
  }
  float sum = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  float square = hsum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; c < n; c++) {
    float away = to_float(x[c]) - shift;
    sum += away;
    square += away * away;
  }
  float mean = sum / n, variance = square / n - mean * mean;
  T rounded;
  from_float(&rounded, shift + mean + deviations * (variance > 0 ? __builtin_sqrtf(variance) : 0.0f));
  return to_float(rounded);
}

// One vector of the row: the entries above the threshold go to the next slots, while there are any.
template <typename T>
INLINE int64_t take(T *values, int32_t *indices, int64_t count, int64_t capacity, f32x16 x, i32x16 place,
                    float threshold, bool by_abs, int64_t n) {
  f32x16 score = by_abs ? abs(x) : x;
#if defined(__AVX512F__)
  __mmask16 valid = (__mmask16)((1u << n) - 1);
  __mmask16 kept = _mm512_mask_cmp_ps_mask(valid, (__m512)score, (__m512)set1(threshold), _CMP_GT_OQ);
  f32x16 packed = (f32x16)_mm512_maskz_compress_ps(kept, (__m512)x);
  __m512i at = _mm512_maskz_compress_epi32(kept, (__m512i)place);
  if (count + LANES <= capacity) {
    store(values + count, packed);
    _mm512_storeu_si512(indices + count, at);
  } else if (count < capacity) {
    store_n(values + count, packed, capacity - count);
    _mm512_mask_storeu_epi32(indices + count, (__mmask16)((1u << (capacity - count)) - 1), at);
  }
  return count + __builtin_popcount(kept);
#else
  for (int i = 0; i < n; i++) {
    if (!(score[i] > threshold)) continue;
    if (count < capacity) {
      from_float(values + count, x[i]);
      indices[count] = place[i];
    }
    count++;
  }
  return count;
#endif
}

template <typename T>
void threshold_select(const T *x, const float *thresholds, T *values, int32_t *indices, int32_t *counts,
                      float deviations, int64_t rows, int64_t n, int64_t capacity, bool by_abs, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *at = x + row * n;
    T *to = values + row * capacity;
    int32_t *places = indices + row * capacity;
    float threshold = thresholds ? thresholds[row] : n ? statistical_threshold(at, n, deviations) : 0.0f;
    i32x16 place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    int64_t count = 0, c = 0;
    for (; c + LANES <= n; c += LANES, place += LANES) {
      __builtin_prefetch(at + n + c);  // this row is in cache; the next one is on its way meanwhile
      count = take(to, places, count, capacity, load(at + c), place, threshold, by_abs, LANES);
    }
    if (c < n) count = take(to, places, count, capacity, load_n(at + c, n - c), place, threshold, by_abs, n - c);
    counts[row] = (int32_t)count;
    for (int64_t i = count; i < capacity; i++) {
      from_float(to + i, 0.0f);
      places[i] = -1;
    }
  }
}

}  // namespace

PAUCITY_KERNEL(topk)
(const void *x, void *values, int32_t *indices, int64_t rows, int64_t n, int64_t k, int64_t by_abs, int64_t dtype,
 int64_t threads) {
  if (rows * k == 0) return 0;
  if (dtype == BF16)
    topk((const bf16 *)x, (bf16 *)values, indices, rows, n, k, by_abs, threads);
  else
    topk((const float *)x, (float *)values, indices, rows, n, k, by_abs, threads);
  return 0;
}

PAUCITY_KERNEL(topk_mask)
(const void *x, uint8_t *mask, int64_t rows, int64_t n, int64_t k, int64_t by_abs, int64_t dtype, int64_t threads) {
  if (rows * n == 0) return 0;
  if (k == 0) {
    memset(mask, 0, rows * n);
    return 0;
  }
  if (dtype == BF16)
    topk_mask((const bf16 *)x, mask, rows, n, k, by_abs, threads);
  else
    topk_mask((const float *)x, mask, rows, n, k, by_abs, threads);
  return 0;
}

// `thresholds` of the rows, or null: `deviations` above the mean.
PAUCITY_KERNEL(threshold_select)
(const void *x, const float *thresholds, void *values, int32_t *indices, int32_t *counts, float deviations,
 int64_t rows, int64_t n, int64_t capacity, int64_t by_abs, int64_t dtype, int64_t threads) {
  if (dtype == BF16)
    threshold_select((const bf16 *)x, thresholds, (bf16 *)values, indices, counts, deviations, rows, n, capacity,
                     by_abs, threads);
  else
    threshold_select((const float *)x, thresholds, (float *)values, indices, counts, deviations, rows, n, capacity,
                     by_abs, threads);
  return 0;
}
