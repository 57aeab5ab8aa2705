// Tree search for the keys that a block of queries sees: equal segments of what it may see are split in two, each half is
// scored by the key block in its middle, the best ones stay, and so on until a segment is one key block.
#include "../pack.h"

namespace {

// The arguments, laid out as in kernels/tree/native.py. Strides count elements; the last dimension is contiguous.
struct Tree {
  int64_t size;  // of this structure, as the caller knows it
  int64_t dtype, batch, heads, kv_heads, queries, keys, dim;
  int64_t query_strides[3], key_strides[3];  // batch, head, token
  const void *query, *key;
  const int64_t *spans;  // [blocks, 5]
  int64_t blocks, q_block, query_stride, segments, k_block, window, width;  // window 0 is none
  int32_t *positions;  // [batch, heads, blocks, width]
  int64_t *counts;     // [batch, heads, blocks]
};

// Queries [first, stop) of the text; they see the keys [oldest, far) and [near, stop) in any case, and search the rest.
struct Span {
  int64_t first, stop, oldest, far, near;
};

enum { BAD_STRUCTURE = 1 };

constexpr int64_t ROWS = 48;  // keys scored at a time

// Lane j of the result is the highest lane of v[j].
INLINE f32x16 max_each(const f32x16 *v) {
#if defined(__AVX512F__)
  __m512 four[4];
  for (int i = 0; i < 4; i++) {
    const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1], c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    four[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  for (int i = 0; i < 4; i += 2)
    four[i / 2] = _mm512_max_ps(_mm512_shuffle_f32x4(four[i], four[i + 1], 0x88),
                                _mm512_shuffle_f32x4(four[i], four[i + 1], 0xdd));
  return (f32x16)_mm512_max_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                               _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
#else
  f32x16 most;
  for (int j = 0; j < 16; j++) most[j] = hmax(v[j]);
  return most;
#endif
}

// Unsigned integers in the order of the scores, -0 as +0.
INLINE u32x16 rank(f32x16 x) {
  i32x16 bits = (i32x16)(x + 0.0f);
  return (u32x16)(bits ^ ((bits >> 31) | (int32_t)0x80000000));
}

#if defined(__AVX512F__)
// The highest products of sixteen keys with sixteen queries. So many sums at a time, as each waits for the one before it.
template <class E>
INLINE f32x16 highest_of_sixteen(const E *const *rows, int64_t depth, const E *queries, i32x16 at, const int32_t *until) {
  f32x16 sums[16] = {};
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    vec b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) b[i] = vload(queries + (k + i) * 16);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) {
      const E *row = rows[m] + k;
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sums[m] = mad(sums[m], row + i, b[i]);
    }
  }
  for (; k < depth; k++) {
    const vec b = vload(queries + k * 16);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) sums[m] = mad(sums[m], rows[m] + k, b);
  }
  if (until) {
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) sums[m] = (at < until[m]) ? sums[m] : set1(-__builtin_inff());
  }
  return max_each(sums);
}
#endif

static int32_t count_at_least(const uint32_t *keys, int32_t n, uint32_t least) {
  int32_t count = 0;
  for (int32_t i = 0; i < n; i++) count += keys[i] >= least;
  return count;
}

// One thread's memory.
template <class T, class E>
struct Work {
  E *query, *spare;
  float *scores, *best;
  uint32_t *ranks;
  int32_t *places, *from, *size, *half, *half_size, *lane_query;
  const E **rows;
  float **score_rows;
  int64_t lanes, row_size;

  void take(Arena &arena, const Tree &p) {
    const int64_t halves = 2 * p.segments;
    lanes = padded(ceil_div(min_of(p.q_block, p.keys), p.query_stride));
    row_size = padded(p.dim) + 16;
    query = arena.take<E>(in_elements<E>(p.dim) * lanes);
    spare = arena.take<E>(max_of(ROWS, lanes) * row_size);
    scores = arena.take<float>(ROWS * lanes);
    best = arena.take<float>(halves * p.k_block + ROWS);
    ranks = arena.take<uint32_t>(halves + LANES);
    places = arena.take<int32_t>(halves * p.k_block + ROWS);
    from = arena.take<int32_t>(p.segments + LANES);  // whole vectors are stored
    size = arena.take<int32_t>(p.segments + LANES);
    half = arena.take<int32_t>(halves + LANES);
    half_size = arena.take<int32_t>(halves + LANES);
    lane_query = arena.take<int32_t>(lanes);
    rows = arena.take<const E *>(max_of(ROWS, lanes));
    score_rows = arena.take<float *>(ROWS);
    if (!arena.base) return;
    for (int64_t i = 0; i < ROWS; i++) score_rows[i] = scores + i * lanes;
  }
};

// Every query_stride-th query of the block, its last one among them, into the lanes; lanes left over repeat the last.
template <class T, class E>
static void take_queries(const Tree &p, const Span &s, int64_t b, int64_t head, Work<T, E> &w) {
  const T *query = (const T *)p.query + b * p.query_strides[0] + head * p.query_strides[1];
  const int64_t count = ceil_div(s.stop - s.first, p.query_stride), before = p.keys - p.queries;
  for (int64_t lane = 0; lane < w.lanes; lane++) {
    int64_t at = s.stop - 1 - max_of(0, count - 1 - lane) * p.query_stride;
    w.lane_query[lane] = (int32_t)at;
    w.rows[lane] = as_elements(query + (at - before) * p.query_strides[2], p.dim, w.spare + lane * w.row_size);
  }
  const int64_t deep = in_elements<E>(p.dim);
  for (int64_t lane = 0; lane < w.lanes; lane += 64)
    pack_across(w.rows + lane, min_of(64, w.lanes - lane), deep, w.query + lane, w.lanes);
}

// best[i] = the highest product of the key at places[i] with a query that sees it.
template <class T, class E>
static void score(const Tree &p, const T *key, int64_t count, Work<T, E> &w) {
  const int64_t deep = in_elements<E>(p.dim), stride = p.key_strides[2];
  const int64_t lines = ceil_div(p.dim * (int64_t)sizeof(T), 64);
  const f32x16 nothing = set1(-__builtin_inff());
  int32_t until[ROWS];  // the first query that does not see the key
  for (int64_t r = 0; r < count; r += ROWS) {
    const int64_t n = min_of(ROWS, count - r), next = min_of(ROWS, count - r - n), full = padded(n);
    for (int64_t i = 0; i < next; i++) {
      const char *row = (const char *)(key + w.places[r + n + i] * stride);
      for (int64_t line = 0; line < lines; line++) __builtin_prefetch(row + line * 64);
    }
    for (int64_t i = 0; i < n; i++)
      w.rows[i] = as_elements(key + w.places[r + i] * stride, p.dim, w.spare + i * w.row_size);
    for (int64_t i = n; i < full; i++) w.rows[i] = w.rows[n - 1];
    if (p.window)
      for (int64_t i = 0; i < full; i++)
        until[i] = (int32_t)min_of(INT32_MAX, w.places[r + min_of(i, n - 1)] + p.window);
#if defined(__AVX512F__)
    if (w.lanes == 16) {
      i32x16 at;
      memcpy(&at, w.lane_query, sizeof at);
      for (int64_t i = 0; i < n; i += 16)
        store(w.best + r + i, highest_of_sixteen(w.rows + i, deep, w.query, at, p.window ? until + i : 0));
      continue;
    }
#endif
    product<false, REPLACE>(w.rows, n, deep, w.query, w.lanes, 0, w.lanes, w.score_rows);
    for (int64_t i = 0; i < n; i += LANES) {
      f32x16 most[LANES];
      for (int64_t j = 0; j < LANES; j++) {
        most[j] = nothing;
        if (i + j >= n) continue;
        const float *row = w.scores + (i + j) * w.lanes;
        for (int64_t lane = 0; lane < w.lanes; lane += LANES) {
          f32x16 x = load(row + lane);
          if (p.window) {
            i32x16 at;
            memcpy(&at, w.lane_query + lane, sizeof at);
            x = (at < until[i + j]) ? x : nothing;
          }
          most[j] = max(most[j], x);
        }
      }
      store(w.best + r + i, max_each(most));
    }
  }
}

// Of the halves, whose ranks are given, the `segments` best, in order of position; of equal ones the first.
template <class T, class E>
static int64_t keep_best(const Tree &p, int64_t halves, Work<T, E> &w) {
  const int32_t n = (int32_t)halves, wanted = (int32_t)p.segments;
  uint32_t least = 0;
  int32_t reach = n;  // how many ranks are at least that
  for (uint32_t bit = 1u << 31; bit && reach != wanted; bit >>= 1) {
    const int32_t count = count_at_least(w.ranks, n, least | bit);
    if (count >= wanted) least |= bit, reach = count;
  }
  int64_t kept = 0;
#if defined(__AVX512F__)
  if (reach == wanted) {
    for (int64_t i = 0; i < halves; i += LANES) {
      const __mmask16 valid = (__mmask16)((1u << min_of(LANES, halves - i)) - 1);
      const __m512i key = _mm512_maskz_loadu_epi32(valid, w.ranks + i);
      const __mmask16 stays = _mm512_mask_cmpge_epu32_mask(valid, key, _mm512_set1_epi32((int)least));
      _mm512_storeu_si512(w.from + kept, _mm512_maskz_compress_epi32(stays, _mm512_loadu_si512(w.half + i)));
      _mm512_storeu_si512(w.size + kept, _mm512_maskz_compress_epi32(stays, _mm512_loadu_si512(w.half_size + i)));
      kept += __builtin_popcount(stays);
    }
    return kept;
  }
#endif
  int64_t equal = reach == wanted ? n : wanted - (least == 0xffffffff ? 0 : count_at_least(w.ranks, n, least + 1));
  for (int64_t i = 0; i < halves && kept < p.segments; i++) {
    const bool tied = w.ranks[i] == least, stays = w.ranks[i] > least || (tied && equal > 0);
    equal -= tied && equal > 0;
    w.from[kept] = w.half[i];
    w.size[kept] = w.half_size[i];
    kept += stays;
  }
  return kept;
}

// The key blocks that the search finds, counted from the span's `far`, ascending in `from`.
template <class T, class E>
static int64_t search(const Tree &p, const Span &s, int64_t b, int64_t head, Work<T, E> &w) {
  const T *key = (const T *)p.key + b * p.key_strides[0] + head / (p.heads / p.kv_heads) * p.key_strides[1];
  const int64_t blocks = ceil_div(s.near - s.far, p.k_block);
  int64_t count = min_of(blocks, p.segments);
  for (int64_t j = 0; j < count; j++) {
    w.from[j] = (int32_t)(j * blocks / count);
    w.size[j] = (int32_t)((j + 1) * blocks / count) - w.from[j];
  }
  if (blocks <= p.segments) return count;
  take_queries(p, s, b, head, w);
  for (int32_t longest = 2; longest > 1;) {
    int64_t halves = 0;
    for (int64_t j = 0; j < count; j++) {
      const int32_t low = w.size[j] / 2;
      w.half[halves] = w.from[j];
      w.half_size[halves] = low;
      halves += low > 0;
      w.half[halves] = w.from[j] + low;
      w.half_size[halves++] = w.size[j] - low;
    }
    const int32_t far = (int32_t)s.far, last = (int32_t)s.near - 1, k_block = (int32_t)p.k_block;
    for (int32_t j = 0; j < k_block; j++) {
      int32_t *to = w.places + j * halves;
      for (int64_t i = 0; i < halves; i++) {
        const int32_t place = far + (w.half[i] + w.half_size[i] / 2) * k_block + j;
        to[i] = place < last ? place : last;
      }
    }
    score(p, key, halves * k_block, w);
    for (int64_t i = 0; i < halves; i += LANES) {
      f32x16 most = load(w.best + i);
      for (int32_t j = 1; j < k_block; j++) most = max(most, load(w.best + j * halves + i));
      const u32x16 key_rank = rank(most);
      memcpy(w.ranks + i, &key_rank, sizeof key_rank);
    }
    count = keep_best(p, halves, w);
    longest = 1;
    for (int64_t j = 0; j < count; j++) longest = w.size[j] > longest ? w.size[j] : longest;
  }
  return count;
}

template <class T>
static void select(const Tree &p, int64_t threads) {
  typedef typename Element<T>::type E;
  const int64_t total = p.batch * p.heads * p.blocks;
#pragma omp parallel num_threads(max_of(1, min_of(threads, total)))
  {
    Work<T, E> w;
    Arena arena = {};
    w.take(arena, p);
    Scratch memory(arena.used);
    arena = {(char *)memory.at, 0};
    w.take(arena, p);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < total; task++) {
      const int64_t i = p.blocks - 1 - task % p.blocks, bh = task / p.blocks;  // the longest first
      const int64_t *span = p.spans + 5 * i;
      const Span s = {span[0], span[1], span[2], span[3], span[4]};
      const int64_t found = search(p, s, bh / p.heads, bh % p.heads, w);
      int64_t searched = 0;
      for (int64_t j = 0; j < found; j++)
        searched += min_of(p.k_block, s.near - s.far - w.from[j] * p.k_block);
      const int64_t count = (s.far - s.oldest) + searched + (s.stop - s.near);
      int32_t *to = p.positions + (bh * p.blocks + i) * p.width;
      p.counts[bh * p.blocks + i] = count;
      for (int64_t j = count; j < p.width; j++) *to++ = -1;
      for (int64_t j = s.oldest; j < s.far; j++) *to++ = (int32_t)j;
      for (int64_t j = 0; j < found; j++) {
        const int64_t start = s.far + w.from[j] * p.k_block, stop = min_of(start + p.k_block, s.near);
        for (int64_t at = start; at < stop; at++) *to++ = (int32_t)at;
      }
      for (int64_t j = s.near; j < s.stop; j++) *to++ = (int32_t)j;
    }
  }
}

}  // namespace

PAUCITY_KERNEL(tree_select)(const Tree *p, int64_t threads) {
  if (p->size != (int64_t)sizeof(Tree)) return BAD_STRUCTURE;
  if (p->dtype == F32)
    select<float>(*p, threads);
  else
    select<bf16>(*p, threads);
  return 0;
}
