// Sparse attention, forward: the online softmax over the tiles of keys that each unit of queries needs.
#include "attention_tiles.h"

#include <math.h>

namespace {

// One thread's memory.
template <class T, class E>
struct Work {
  Keys keys;
  T *zeros;
  E *query, *key, *value, *probability;
  float *out, *logits, *bias, *top, *sum, *alpha;
  const T **rows;
  const E **key_rows, **value_rows, **query_rows;
  float **out_rows, **logit_rows;
  Sight *sights;

  void take(Arena &arena, const Attention &p, const Plan &plan) {
    int64_t panels = plan.most_panels, wide = p.dim > p.value_dim ? p.dim : p.value_dim;
    keys.take(arena, p, plan);
    zeros = arena.take<T>(wide + 2);
    query = arena.take<E>(panels * in_elements<E>(p.dim) * TILE);
    key = arena.take<E>(TILE * in_elements<E>(p.dim));
    value = arena.take<E>(TILE * (p.value_dim + 16));
    probability = arena.take<E>(TILE * TILE);
    out = arena.take<float>(panels * p.value_dim * TILE);
    logits = arena.take<float>(TILE * TILE);
    bias = arena.take<float>(TILE * TILE);
    top = arena.take<float>(panels * TILE);
    sum = arena.take<float>(panels * TILE);
    alpha = arena.take<float>(TILE);
    rows = arena.take<const T *>(TILE);
    key_rows = arena.take<const E *>(TILE);
    value_rows = arena.take<const E *>(TILE);
    query_rows = arena.take<const E *>(TILE);
    out_rows = arena.take<float *>(panels * p.value_dim);
    logit_rows = arena.take<float *>(TILE);
    sights = arena.take<Sight>(panels);
    if (!arena.base) return;
    memset(zeros, 0, (wide + 2) * sizeof(T));
    for (int64_t i = 0; i < TILE; i++) logit_rows[i] = logits + i * TILE;
    for (int64_t i = 0; i < panels * p.value_dim; i++) out_rows[i] = out + i * TILE;
  }
};

INLINE vec highest(const float *s, int64_t count, vec most) {
  vec a = most, b = most, c = most;
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    most = vmax(most, vload(s + k * TILE));
    a = vmax(a, vload(s + (k + 1) * TILE));
    b = vmax(b, vload(s + (k + 2) * TILE));
    c = vmax(c, vload(s + (k + 3) * TILE));
  }
  for (; k < count; k++) most = vmax(most, vload(s + k * TILE));
  return vmax(vmax(most, a), vmax(b, c));
}

// Turn logits into probabilities, as the A or B of the next product needs them; `top`, `sum` and `alpha` follow.
NOINLINE void soften(const float *s, int64_t count, int64_t lane, int64_t lanes, float *top, float *sum, float *alpha,
                     float *to) {
  for (int64_t i = lane; i < lanes; i += W) {
    vec most = vload(top + i);
    const vec before = most;
    most = highest(s + i, count, most);
    vstore(top + i, most);
    const vec base = (most == -__builtin_inff()) ? vec{} : most;
    const vec shrink = exp2_of<true>(before - base);
    vec total = vload(sum + i) * shrink;
    vstore(alpha + i, shrink);
    for (int64_t k = 0; k < count; k++) {
      vec x = exp2_of<true>(vload(s + k * TILE + i) - base);
      total += x;
      vstore(to + k * TILE + i, x);
    }
    vstore(sum + i, total);
  }
}

#if defined(__AVX512BF16__)
NOINLINE void soften(const float *s, int64_t count, int64_t lane, int64_t lanes, float *top, float *sum, float *alpha,
                     pair *to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t i = lane; i < lanes; i += W) {
    vec most = vload(top + i);
    const vec before = most;
    most = highest(s + i, count, most);
    vstore(top + i, most);
    const vec base = (most == -__builtin_inff()) ? vec{} : most;
    const vec shrink = exp2_of<false>(before - base);
    vec total = vload(sum + i) * shrink, other = {};
    vstore(alpha + i, shrink);
    pair *at = to + i;
    const float *from = s + i;
    for (int64_t k = 0; k + 2 <= count; k += 2, at += TILE, from += 2 * TILE) {
      vec x = exp2_of<false>(vload(from) - base), y = exp2_of<false>(vload(from + TILE) - base);
      total += x;
      other += y;
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
      _mm512_storeu_si512(at, _mm512_permutexvar_epi16(order, both));
    }
    if (count % 2) {
      vec x = exp2_of<false>(vload(from) - base);
      total += x;
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), (__m512)x);
      _mm512_storeu_si512(at, _mm512_permutexvar_epi16(order, both));
    }
    vstore(sum + i, total + other);
  }
}
#endif

// The values of a tile as the A of the second product.
template <class T>
static void lay_values(Work<T, float> &, const Tile &, int64_t) {}  // the rows themselves, key by key

template <class T>
static void lay_values(Work<T, pair> &w, const Tile &t, int64_t length) {
  int64_t padded = ceil_div(length, 16) * 16;
  interleave(w.rows, t.count, length, padded, w.zeros, w.value);
  for (int64_t k = 0; k < t.count; k += 2) w.value_rows[k / 2] = w.value + k / 2 * padded;
}

template <class T, class E>
static void attend(const Attention &p, const Unit &u, const Tile &t, Work<T, E> &w) {
  const int64_t deep = in_elements<E>(p.dim), panels = ceil_div(u.rows, TILE);
  uint64_t seen[TILE] = {};
  bool whole = false;  // some panel sees all keys
  for (int64_t panel = 0; panel < panels; panel++) {
    Sight &sight = w.sights[panel];
    if (p.bias) take_bias(p, u, w.keys, t, panel, w.bias);
    see(p, u, w.keys, t, panel, p.bias ? w.bias : 0, sight);
    whole |= sight.all;
    if (!sight.all)
      for (int64_t k = 0; k < t.count; k++) seen[k] |= sight.bits[k];
  }
  const uint64_t *by_key = whole ? 0 : seen;
  take_rows<T, E>(p.key, p.key_strides, u, t, by_key, p.dim, w.key, w.zeros, w.rows, w.key_rows);
  take_rows<T, E>(p.value, p.value_strides, u, t, by_key, p.value_dim, w.value, w.zeros, w.rows, w.value_rows);
  lay_values(w, t, p.value_dim);
  const bool plain = p.softcap == 0 && !p.bias;
  const float scale = (float)(plain ? p.scale * (double)LOG2E : p.scale);
  for (int64_t panel = 0; panel < panels; panel++) {
    const Sight &sight = w.sights[panel];
    if (sight.none) continue;
    const int64_t lanes = ceil_div(min_of(TILE, u.rows - panel * TILE), W) * W;
    if (p.bias) take_bias(p, u, w.keys, t, panel, w.bias);
    const bool one = sight.all || (sight.from[0] == sight.from[1] && sight.until[0] == sight.until[1]);
    for (int64_t lane = 0; lane < lanes; lane += one ? TILE : HALF) {
      // Pairs of keys start at even ones.
      const int64_t from = sight.from[lane / HALF] & ~1, until = sight.until[lane / HALF], count = until - from;
      const int64_t stop = one ? lanes : min_of(lane + HALF, lanes), at = panel * TILE;
      if (until == 0) continue;
      product<false, REPLACE>(w.key_rows + from, count, deep, w.query + at * deep, TILE, lane, stop,
                              w.logit_rows + from, scale);
      if (!plain || !sight.all)
        finish_logits(p, from, until, lane, stop, p.bias ? w.bias : 0, sight, w.logits, 0);
      soften(w.logits + from * TILE, count, lane, stop, w.top + at, w.sum + at, w.alpha, w.probability);
      product<true, RESCALE>(w.value_rows + in_elements<E>(from), p.value_dim, in_elements<E>(count), w.probability,
                             TILE, lane, stop, w.out_rows + panel * p.value_dim, 1.0f, w.alpha);
    }
  }
}

// Divide by the sums, and write the rows where they belong.
template <class T, class E>
static void give_out(const Attention &p, const Unit &u, Work<T, E> &w) {
  const int64_t wide = p.value_dim;
  int64_t rows[TILE];
  for (int64_t panel = 0; panel * TILE < u.rows; panel++) {
    const int32_t *head = w.keys.row_head + panel * TILE, *query = w.keys.row_query + panel * TILE;
    float *sum = w.sum + panel * TILE, *out = w.out + panel * wide * TILE;
    const int64_t count = min_of(TILE, u.rows - panel * TILE);
    for (int64_t r = 0; r < count; r++) {
      rows[r] = (u.b * p.heads + head[r]) * p.queries + query[r];
      bool any = sum[r] != 0;
      p.lse[rows[r]] = any ? (w.top[panel * TILE + r] + log2f(sum[r])) * LN2 : -__builtin_inff();
      sum[r] = any ? 1 / sum[r] : 0;
    }
    write_panel(out, sum, count, wide, (T *)p.out, rows);
  }
}

template <class T, class E>
static void run_unit(const Attention &p, const Unit &u, Work<T, E> &w) {
  if (!u.count) return;
  const int64_t deep = in_elements<E>(p.dim), panels = ceil_div(u.rows, TILE);
  w.keys.find(p, u);
  memset(w.out, 0, panels * p.value_dim * TILE * sizeof(float));
  for (int64_t i = 0; i < panels * TILE; i++) w.top[i] = -__builtin_inff(), w.sum[i] = 0;
  for (int64_t panel = 0; panel < panels && w.keys.count; panel++) {
    // The keys' buffer is free until the first tile.
    take_panel<T, E>(p.query, p.query_strides, u, w.keys, panel, p.dim, w.key, w.rows, w.query_rows);
    pack_across(w.query_rows, min_of(TILE, u.rows - panel * TILE), deep, w.query + panel * deep * TILE, TILE);
  }
  for (int64_t first = 0; first < w.keys.count;) {
    Tile t = tile_at(p, u, w.keys, first);
    attend(p, u, t, w);
    first += t.count;
  }
  give_out(p, u, w);
}

template <class T>
static void forward(const Attention &p, int64_t threads) {
  typedef typename Element<T>::type E;
  const Plan plan(p);
  const int64_t units = p.batch * p.kv_heads * plan.units_per_kv_head;
#pragma omp parallel num_threads(threads)
  {
    Work<T, E> w;
    Arena count = {0, 0};
    w.take(count, p, plan);
    Scratch scratch(count.used);
    Arena arena = {(char *)scratch.at, 0};
    w.take(arena, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; i++) {
      int64_t row = i / plan.units_per_kv_head;
      run_unit(p, unit_at(p, plan, row / p.kv_heads, row % p.kv_heads, i % plan.units_per_kv_head), w);
    }
  }
}

}  // namespace

PAUCITY_KERNEL(attention)(const Attention *p, int64_t threads) {
  if (p->size != (int64_t)sizeof(Attention)) return BAD_STRUCTURE;
  if (!positions_fit(*p)) return BAD_POSITION;
  if (p->dtype == F32)
    forward<float>(*p, threads);
  else
    forward<bf16>(*p, threads);
  return 0;
}
