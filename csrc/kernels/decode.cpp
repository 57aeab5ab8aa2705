// Decode attention: a few queries against a long cache, of which only the listed pages are read. Bound by memory: a row
// of the cache is read once for all queries that share it. The keys of a list are cut into chunks by sizes alone; each
// chunk leaves a partial result, and these are merged in order, so the result does not depend on the threads.
#include "simd.h"

namespace {

// As in native.py. Strides are in elements; the last one is 1.
struct Sizes {
  int64_t dtype, batch, kv_heads, rows;  // rows: queries that share a KV head, query position fastest
  int64_t queries, keys, dim, value_dim;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t pages, page_size, page_bytes, page_batch, page_head;  // pages in a list; bytes of a number, 0: no list
  int64_t window;                                               // 0: none
  float scale, softcap;                                         // softcap 0: none
};

enum Wrong { PAGE = 1, LENGTH = 2, START = 3 };

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8, SUMS = 16;
#else
constexpr int MOST_ROWS = 4, SUMS = 4;  // of the sixteen registers, f32x16 takes two or four
#endif
constexpr int64_t CHUNKS = 32;  // where there are keys enough, to balance a few threads
constexpr int64_t TILE = 32;   // keys whose values stay in L1 while slice after slice of their columns is added up
constexpr int64_t AHEAD = 32;  // rows between the one in use and the one that is asked for

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

// A unit is what one register holds of a row, and the products that it adds to sixteen sums.
template <typename T>
struct Unit {
  typedef float Q;
  typedef f32x16 Vector;
  static constexpr int64_t COLUMNS = 16;
  static constexpr int64_t PAIR = 1;  // keys that one product with the values takes
  INLINE Vector load(const T *p) { return ::load(p); }
  INLINE Vector load_query(const float *p) { return ::load(p); }
  INLINE Vector load_n(const T *p, int64_t n) { return ::load_n(p, n); }
  INLINE f32x16 dot(f32x16 sum, Vector q, Vector k) { return sum + q * k; }
};

#if defined(__AVX512BF16__)
template <>
struct Unit<bf16> {
  typedef bf16 Q;
  typedef __m512i Vector;
  static constexpr int64_t COLUMNS = 32;
  static constexpr int64_t PAIR = 2;
  INLINE Vector load(const bf16 *p) { return _mm512_loadu_si512(p); }
  INLINE Vector load_n(const bf16 *p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1, p);
  }
  INLINE Vector load_query(const bf16 *p) { return load(p); }
  INLINE f32x16 dot(f32x16 sum, Vector q, Vector k) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)k);
  }
};
#endif

#if defined(__AVX512F__)
// The halves of a, then of b, each with its quarters added.
INLINE __m512 fold(__m512 a, __m512 b) {
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}
#endif

// Lane j of the result is the sum of the lanes of v[j].
INLINE f32x16 sum_each(const f32x16 *v) {
#if defined(__AVX512F__)
  __m512 four[4];
  for (int i = 0; i < 4; i++) {
    const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1], c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  }
  const __m512 low = fold(four[0], four[1]), high = fold(four[2], four[3]);
  return (f32x16)fold(low, high);
#else
  f32x16 all;
  for (int i = 0; i < 4; i++) {
    f32x4 four[4];
    for (int j = 0; j < 4; j++) {
      f32x4 part[4];
      memcpy(part, v + 4 * i + j, sizeof part);
      four[j] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    const i32x4 even = {0, 4, 1, 5}, odd = {2, 6, 3, 7}, front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
    const f32x4 ab = __builtin_shuffle(four[0], four[1], even) + __builtin_shuffle(four[0], four[1], odd);
    const f32x4 cd = __builtin_shuffle(four[2], four[3], even) + __builtin_shuffle(four[2], four[3], odd);
    const f32x4 sums = __builtin_shuffle(ab, cd, front) + __builtin_shuffle(ab, cd, back);
    memcpy((char *)&all + i * sizeof sums, &sums, sizeof sums);
  }
  return all;
#endif
}

// Into L2: asking for that much at once would keep L1 waiting.
INLINE void ask_for(const void *row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row + at, 0, 2);
}

INLINE f32x16 tanh_of(f32x16 x) {
  const f32x16 t = exp(abs(x) * -2.0f);
  const f32x16 y = (1.0f - t) / (1.0f + t);
  return (x < 0.0f) ? -y : y;
}

// What a thread works with. Entry k of `at` is the position of the k-th key of the chunk; AHEAD more are readable.
struct Work {
  int32_t *at;
  float *logits;  // [row][most]
  void *weights;  // [row][most], of type Unit::Q
  void *query;    // [row][dim, up to a whole unit]
  f32x16 *sums;   // [row][16 keys]
  float *out;     // [row][value_dim, up to a whole unit]
  int64_t most;   // keys of a chunk, a multiple of TILE
};

// Plain products of R queries with n rows of keys, by sixteens.
template <typename T, int R>
void products(const Sizes &s, const Work &w, const T *key, int64_t n) {
  typedef Unit<T> U;
  const typename U::Q *query = (const typename U::Q *)w.query;
  const int64_t whole = s.dim / U::COLUMNS * U::COLUMNS, width = ceil_div(s.dim, U::COLUMNS) * U::COLUMNS;
  const int64_t bytes = s.dim * (int64_t)sizeof(T);
  for (int64_t k = 0; k < AHEAD; k++) ask_for(key + w.at[k] * s.key_row, bytes);
  for (int64_t first = 0; first < n; first += LANES) {
    const int64_t stop = min_of(LANES, n - first);
    for (int64_t j = 0; j < stop; j += 2) {  // two keys at a time halve what is loaded of the queries
      const int32_t *at = w.at + first + j;
      const T *a = key + at[0] * s.key_row, *b = key + at[1] * s.key_row;
      ask_for(key + at[AHEAD] * s.key_row, bytes);
      ask_for(key + at[AHEAD + 1] * s.key_row, bytes);
      f32x16 sum[R][2] = {};
      for (int64_t c = 0; c < whole; c += U::COLUMNS) {
        const typename U::Vector x = U::load(a + c), y = U::load(b + c);
        for (int r = 0; r < R; r++) {
          const typename U::Vector q = U::load_query(query + r * width + c);
          sum[r][0] = U::dot(sum[r][0], q, x);
          sum[r][1] = U::dot(sum[r][1], q, y);
        }
      }
      if (whole < s.dim) {
        const typename U::Vector x = U::load_n(a + whole, s.dim - whole), y = U::load_n(b + whole, s.dim - whole);
        for (int r = 0; r < R; r++) {
          const typename U::Vector q = U::load_query(query + r * width + whole);
          sum[r][0] = U::dot(sum[r][0], q, x);
          sum[r][1] = U::dot(sum[r][1], q, y);
        }
      }
      for (int r = 0; r < R; r++) w.sums[r * LANES + j] = sum[r][0], w.sums[r * LANES + j + 1] = sum[r][1];
    }
    for (int r = 0; r < R; r++) store(w.logits + r * w.most + first, sum_each(w.sums + r * LANES));
  }
}

INLINE void put_weights(float *to, f32x16 p) { store(to, p); }
INLINE void put_weights(bf16 *to, f32x16 p) { store(to, p); }

// Logits of one row to weights relative to the largest; keys from n to the end of the last tile get 0.
template <typename Q>
void soften(const Sizes &s, const Work &w, int r, int64_t n, int64_t low, int64_t high, bool hides, float *most,
            float *total) {
  float *logits = w.logits + r * w.most;
  Q *weights = (Q *)w.weights + r * w.most;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 nothing = set1(-__builtin_inff());
  f32x16 top = nothing;
  for (int64_t k = 0; k < n; k += LANES) {
    f32x16 x = load(logits + k) * s.scale;
    if (s.softcap != 0) x = tanh_of(x / s.softcap) * s.softcap;
    if (hides) {
      i32x16 at;
      memcpy(&at, w.at + k, sizeof at);
      x = (at >= (int32_t)low) & (at < (int32_t)high) ? x : nothing;
    }
    if (k + LANES > n) x = (lane < (int32_t)(n - k)) ? x : nothing;
    store(logits + k, x);
    top = max(top, x);
  }
  *most = hmax(top);
  const float shift = *most == -__builtin_inff() ? 0 : *most;
  f32x16 sum = {};
  int64_t k = 0;
  for (; k < n; k += LANES) {
    const f32x16 p = exp(load(logits + k) - shift);
    sum += p;
    put_weights(weights + k, p);
  }
  for (; k % TILE; k += LANES) put_weights(weights + k, f32x16{});
  *total = hsum(sum);
}

// Adds weights times values of the keys [first, stop) to V units of columns of R rows. `tail` is how many columns the
// unit has where it is not whole, else 0.
template <typename T, int R, int V>
void weigh(const Sizes &s, const Work &w, const T *value, int64_t first, int64_t stop, int64_t column, int64_t tail,
           int64_t width) {
  typedef Unit<T> U;
  const typename U::Q *weights = (const typename U::Q *)w.weights;
  const int64_t asked = column ? 0 : s.value_dim * (int64_t)sizeof(T);
  float *const to = w.out + column;
  f32x16 sum[R][V * U::PAIR];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V * (int)U::PAIR; v++) sum[r][v] = load(to + r * width + v * LANES);
#if defined(__AVX512BF16__)
  if constexpr (U::PAIR == 2) {
    for (int64_t k = first; k < stop; k += 2) {
      const bf16 *a = value + w.at[k] * s.value_row + column, *b = value + w.at[k + 1] * s.value_row + column;
      ask_for(value + w.at[k + AHEAD] * s.value_row, asked);
      ask_for(value + w.at[k + 1 + AHEAD] * s.value_row, asked);
      __m512bh low[V], high[V];
      for (int v = 0; v < V; v++) {
        const __m512i x = tail ? U::load_n(a, tail) : U::load(a + 32 * v);
        const __m512i y = k + 1 == stop ? _mm512_setzero_si512() : tail ? U::load_n(b, tail) : U::load(b + 32 * v);
        low[v] = (__m512bh)_mm512_unpacklo_epi16(x, y);
        high[v] = (__m512bh)_mm512_unpackhi_epi16(x, y);
      }
      for (int r = 0; r < R; r++) {
        int32_t pair;
        memcpy(&pair, weights + r * w.most + k, sizeof pair);
        const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; v++) {
          sum[r][2 * v] = (f32x16)_mm512_dpbf16_ps((__m512)sum[r][2 * v], low[v], p);
          sum[r][2 * v + 1] = (f32x16)_mm512_dpbf16_ps((__m512)sum[r][2 * v + 1], high[v], p);
        }
      }
    }
  } else
#endif
  {
    for (int64_t k = first; k < stop; k++) {
      const T *row = value + w.at[k] * s.value_row + column;
      ask_for(value + w.at[k + AHEAD] * s.value_row, asked);
      f32x16 x[V];
      for (int v = 0; v < V; v++) x[v] = tail ? ::load_n(row, tail) : ::load(row + LANES * v);
      for (int r = 0; r < R; r++) {
        const float p = to_float(weights[r * w.most + k]);
        for (int v = 0; v < V; v++) sum[r][v] += x[v] * p;
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V * (int)U::PAIR; v++) store(to + r * width + v * LANES, sum[r][v]);
}

// Where column c of a row lies: interleaving two rows leaves the columns of a unit of 32 as 0-3, 8-11, 16-19, 24-27,
// and then the others.
template <typename T>
INLINE int64_t place(int64_t c) {
  if (Unit<T>::PAIR == 1) return c;
  return c / 32 * 32 + c % 32 / 8 * 4 + c % 4 + c / 4 % 2 * 16;
}

// A row's result over a chunk: the largest logit, the sum of the weights and of the weighted values.
struct Part {
  float *most, *total, *out;
};

// The queries [row0, row0 + rows) of the KV head against the n keys of a chunk.
template <typename T, int R>
void attend(const Sizes &s, const Work &w, const T *query, int64_t row0, int64_t rows, const T *key, const T *value,
            int64_t n, int64_t length, const Part &part) {
  typedef Unit<T> U;
  const int64_t padded = ceil_div(s.dim, U::COLUMNS) * U::COLUMNS;
  const int64_t width = ceil_div(s.value_dim, U::COLUMNS) * U::COLUMNS;
  typename U::Q *copy = (typename U::Q *)w.query;
  memset((void *)copy, 0, R * padded * sizeof *copy);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < s.dim; c++) from_float(copy + r * padded + c, to_float(query[(row0 + r) * s.dim + c]));
  products<T, R>(s, w, key, n);
  for (int64_t k = 0; k < AHEAD; k++) ask_for(value + w.at[k] * s.value_row, s.value_dim * sizeof(T));
  for (int r = 0; r < R; r++) {
    const int64_t high = length - s.queries + 1 + (row0 + r) % s.queries;
    const int64_t low = s.window ? max_of(high - s.window, 0) : 0;
    float most, total;
    soften<typename U::Q>(s, w, r, n, low, high, s.queries > 1, &most, &total);
    if (r < rows) part.most[row0 + r] = most, part.total[row0 + r] = total;
  }
  memset(w.out, 0, R * width * sizeof(float));
  constexpr int FIT = SUMS / R / (int)U::PAIR, V = FIT > 4 ? 4 : FIT > 1 ? FIT : 1;
  for (int64_t first = 0; first < n; first += TILE) {
    const int64_t stop = min_of(first + TILE, n);
    int64_t c = 0;
    for (; c + V * U::COLUMNS <= s.value_dim; c += V * U::COLUMNS)
      weigh<T, R, V>(s, w, value, first, stop, c, 0, width);
    for (; c + U::COLUMNS <= s.value_dim; c += U::COLUMNS) weigh<T, R, 1>(s, w, value, first, stop, c, 0, width);
    if (c < s.value_dim) weigh<T, R, 1>(s, w, value, first, stop, c, s.value_dim - c, width);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < s.value_dim; c++)
      part.out[(row0 + r) * s.value_dim + c] = w.out[r * width + place<T>(c)];
}

struct Cache {
  const void *query, *key, *value, *pages;
  const int64_t *lengths, *starts;
  const uint8_t *padding;
};

INLINE int64_t page_at(const Sizes &s, const void *pages, int64_t i) {
  return s.page_bytes == 8 ? ((const int64_t *)pages)[i] : ((const int32_t *)pages)[i];
}

// Positions that some query may see among the entries [first, stop) of the list, counted in keys.
int64_t positions(const Sizes &s, const Cache &c, int64_t batch, int64_t head, int64_t first, int64_t stop,
                  int64_t length, int32_t *at) {
  const int64_t earliest = s.window ? max_of(length - s.queries + 1 - s.window, 0) : 0;
  const int64_t list = batch * s.page_batch + head * s.page_head;
  const int64_t start = c.starts ? c.starts[batch * s.kv_heads + head] : 0;
  const uint8_t *real = c.padding ? c.padding + batch * s.keys + start : nullptr;
  int64_t n = 0;
  for (int64_t page = first / s.page_size; page * s.page_size < stop; page++) {
    const int64_t number = s.page_bytes ? page_at(s, c.pages, list + page) : page;
    if (number < 0) continue;
    const int64_t shift = (number - page) * s.page_size;
    const int64_t low = max_of(max_of(page * s.page_size, first) + shift, earliest);
    const int64_t high = min_of(min_of((page + 1) * s.page_size, stop) + shift, length);
    for (int64_t p = low; p < high; p++) {
      at[n] = (int32_t)p;
      n += real ? real[p] != 0 : 1;
    }
  }
  for (int64_t i = 0; i < AHEAD + 2 && n; i++) at[n + i] = at[n - 1];
  return n;
}

template <typename T>
void chunk(const Sizes &s, const Cache &c, const Work &w, int64_t list, int64_t first, int64_t stop, const Part &part) {
  const int64_t batch = list / s.kv_heads, head = list % s.kv_heads;
  const int64_t start = c.starts ? c.starts[list] : 0, length = c.lengths ? c.lengths[list] : s.keys - start;
  const int64_t n = positions(s, c, batch, head, first, stop, length, w.at);
  const T *query = (const T *)c.query + list * s.rows * s.dim;
  const T *key = (const T *)c.key + batch * s.key_batch + head * s.key_head + start * s.key_row;
  const T *value = (const T *)c.value + batch * s.value_batch + head * s.value_head + start * s.value_row;
  for (int64_t row = 0; row < s.rows;) {
    const int64_t rows = min_of(s.rows - row, MOST_ROWS);
    if (n == 0)
      for (int64_t r = row; r < row + rows; r++) part.most[r] = -__builtin_inff(), part.total[r] = 0;
    else if (rows == 1)
      attend<T, 1>(s, w, query, row, rows, key, value, n, length, part);
    else if (rows == 2)
      attend<T, 2>(s, w, query, row, rows, key, value, n, length, part);
    else if (rows <= 4)
      attend<T, 4>(s, w, query, row, rows, key, value, n, length, part);
    else
      attend<T, MOST_ROWS>(s, w, query, row, rows, key, value, n, length, part);
    row += rows;
  }
}

// One row of the result from its parts, in the order of the chunks.
template <typename T>
void merge(const Sizes &s, const Part &part, int64_t chunks, float *sums, T *out, float *lse) {
  const int64_t stride = s.rows;
  float most = -__builtin_inff(), total = 0;
  for (int64_t i = 0; i < chunks; i++) most = part.most[i * stride] > most ? part.most[i * stride] : most;
  memset(sums, 0, s.value_dim * sizeof(float));
  for (int64_t i = 0; i < chunks; i++) {
    if (part.total[i * stride] == 0) continue;  // nothing seen, and `out` may not be written
    const float factor = exp(set1(part.most[i * stride] - most))[0];
    total += part.total[i * stride] * factor;
    const float *from = part.out + i * stride * s.value_dim;
    for (int64_t c = 0; c < s.value_dim; c++) sums[c] += from[c] * factor;
  }
  const float factor = total == 0 ? 0 : 1 / total;
  for (int64_t c = 0; c < s.value_dim; c++) from_float(out + c, sums[c] * factor);
  *lse = total == 0 ? -__builtin_inff() : most + __builtin_logf(total);
}

bool out_of_range(const Sizes &s, const void *pages) {
  const int64_t limit = ceil_div(s.keys, s.page_size);
  bool wrong = false;
  for (int64_t b = 0; b < (s.page_batch ? s.batch : 1); b++)
    for (int64_t h = 0; h < (s.page_head ? s.kv_heads : 1); h++)
      for (int64_t i = 0; i < s.pages; i++) {
        const int64_t page = page_at(s, pages, b * s.page_batch + h * s.page_head + i);
        wrong |= (page < -1) | (page >= limit);
      }
  return wrong;
}

template <typename T>
void decode(const Sizes &s, const Cache &c, T *out, float *lse, int64_t threads) {
  const int64_t lists = s.batch * s.kv_heads, listed = s.pages * s.page_size;
  const int64_t share = min_of(max_of(ceil_div(lists * listed, CHUNKS), 256), 1024);
  const int64_t most = ceil_div(ceil_div(listed, max_of(ceil_div(listed, share), 1)), TILE) * TILE;
  const int64_t chunks = listed ? ceil_div(listed, most) : 0;
  const int64_t width = ceil_div(s.value_dim, 32) * 32, padded = ceil_div(s.dim, 32) * 32;
  const int64_t parts = lists * chunks * s.rows;
  Scratch kept((2 + s.value_dim) * parts * sizeof(float));
  float *const all = (float *)kept.at;
  if (lists * listed * (s.dim + s.value_dim) < 65536) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    const int64_t bytes[] = {(most + AHEAD + 2) * 4, MOST_ROWS * most * 4,    MOST_ROWS * most * 4,
                             MOST_ROWS * padded * 4, MOST_ROWS * LANES * 64, MOST_ROWS * width * 4};
    int64_t at[7] = {0};
    for (int i = 0; i < 6; i++) at[i + 1] = at[i] + ceil_div(bytes[i], 64) * 64;
    Scratch own(at[6]);
    char *const base = (char *)own.at;
    const Work w = {(int32_t *)base,     (float *)(base + at[1]), base + at[2], base + at[3], (f32x16 *)(base + at[4]),
                    (float *)(base + at[5]), most};
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < lists * chunks; i++) {
      const int64_t first = i % chunks * most, row = i * s.rows;
      const Part part = {all + row, all + parts + row, all + 2 * parts + row * s.value_dim};
      chunk<T>(s, c, w, i / chunks, first, min_of(first + most, listed), part);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < lists * s.rows; i++) {
      const int64_t row = i / s.rows * chunks * s.rows + i % s.rows;
      const Part part = {all + row, all + parts + row, all + 2 * parts + row * s.value_dim};
      merge<T>(s, part, chunks, w.out, out + i * s.value_dim, lse + i);
    }
  }
}

}  // namespace

PAUCITY_KERNEL(decode_attention)
(const void *query, const void *key, const void *value, const void *pages, const int64_t *lengths,
 const int64_t *starts, const uint8_t *padding, void *out, float *lse, const Sizes *given, int64_t threads) {
  Sizes s = *given;
  int64_t longest = 0;
  for (int64_t i = 0; i < s.batch * s.kv_heads; i++) {
    const int64_t start = starts ? starts[i] : 0;
    if (start < 0 || start > s.keys) return START;
    if (lengths && (lengths[i] < 0 || lengths[i] > s.keys - start)) return LENGTH;
    longest = max_of(longest, lengths ? lengths[i] : s.keys - start);
  }
  if (s.page_bytes) {
    if (out_of_range(s, pages)) return PAGE;
  } else {
    s.page_size = 64;
    s.pages = ceil_div(longest, s.page_size);
  }
  const Cache c = {query, key, value, pages, lengths, starts, padding};
  if (s.dtype == BF16)
    decode<bf16>(s, c, (bf16 *)out, lse, threads);
  else
    decode<float>(s, c, (float *)out, lse, threads);
  return 0;
}
