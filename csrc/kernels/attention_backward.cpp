// Sparse attention, backward: probabilities again from the log-sum-exp, tile by tile.
//
// Units of one key-value head add to its keys' and values' gradients in a fixed order, in as many sums as there are
// parts; these are added last. So no result depends on the number of threads.
#include "attention_tiles.h"

namespace {

// One thread's memory.
template <class T, class E>
struct Work {
  Keys keys;
  T *zeros;
  E *query, *grad;            // queries and output gradients of the unit, by panel: lanes are rows
  E *query_down, *grad_down;  // the same, lanes are dimensions
  E *key, *value, *key_down;
  E *probability, *slope_across, *slope_down;  // what P and dS are as A, and dS as B
  float *grad_query, *logits, *grads, *softcap, *bias, *lse, *delta, *ones;
  const T **rows;
  const E **key_rows, **value_rows, **panel_rows, **key_across, **probability_rows, **slope_rows;
  float **query_sums, **key_sums, **value_sums, **logit_rows, **grad_rows;
  Sight *sights;

  void take(Arena &arena, const Attention &p, const Plan &plan) {
    const int64_t panels = plan.most_panels, wide = max_of(p.dim, p.value_dim);
    const int64_t dims = in_elements<E>(p.dim), value_dims = in_elements<E>(p.value_dim);
    keys.take(arena, p, plan);
    zeros = arena.take<T>(wide + 2);
    query = arena.take<E>(panels * dims * TILE);
    grad = arena.take<E>(panels * value_dims * TILE);
    query_down = arena.take<E>(panels * TILE * padded(p.dim));
    grad_down = arena.take<E>(panels * TILE * padded(p.value_dim));
    key = arena.take<E>(TILE * (dims + 1));
    value = arena.take<E>(TILE * (max_of(dims, value_dims) + 1));
    key_down = arena.take<E>(TILE * padded(p.dim));
    probability = arena.take<E>(TILE * TILE);
    slope_across = arena.take<E>(TILE * TILE);
    slope_down = arena.take<E>(TILE * TILE);
    grad_query = arena.take<float>(panels * p.dim * TILE);
    logits = arena.take<float>(TILE * TILE);
    grads = arena.take<float>(TILE * TILE);
    softcap = arena.take<float>(TILE * TILE);
    bias = arena.take<float>(TILE * TILE);
    lse = arena.take<float>(panels * TILE);
    delta = arena.take<float>(panels * TILE);
    ones = arena.take<float>(TILE);
    rows = arena.take<const T *>(TILE);
    key_rows = arena.take<const E *>(TILE);
    value_rows = arena.take<const E *>(TILE);
    panel_rows = arena.take<const E *>(TILE);
    key_across = arena.take<const E *>(TILE);
    probability_rows = arena.take<const E *>(TILE);
    slope_rows = arena.take<const E *>(TILE);
    query_sums = arena.take<float *>(panels * p.dim);
    key_sums = arena.take<float *>(TILE);
    value_sums = arena.take<float *>(TILE);
    logit_rows = arena.take<float *>(TILE);
    grad_rows = arena.take<float *>(TILE);
    sights = arena.take<Sight>(panels);
    if (!arena.base) return;
    memset(zeros, 0, (wide + 2) * sizeof(T));
    for (int64_t i = 0; i < TILE; i++) {
      ones[i] = 1;
      logit_rows[i] = logits + i * TILE;
      grad_rows[i] = grads + i * TILE;
      probability_rows[i] = probability + i * TILE;
      slope_rows[i] = slope_across + i * TILE;
    }
    for (int64_t i = 0; i < panels * p.dim; i++) query_sums[i] = grad_query + i * TILE;
  }
};

// The keys of a tile as the A of the product with dS.
template <class T>
static void lay_keys(Work<T, float> &w, const Tile &t, int64_t) {
  for (int64_t k = 0; k < t.count; k++) w.key_across[k] = w.key_rows[k];
}

template <class T>
static void lay_keys(Work<T, pair> &w, const Tile &t, int64_t length) {
  interleave(w.rows, t.count, length, padded(length), w.zeros, w.key_down);
  for (int64_t k = 0; k < t.count; k += 2) w.key_across[k / 2] = w.key_down + k / 2 * padded(length);
}

// Two keys' values in 16 lanes, in the forms that the products need.
INLINE void put_row(float *to, int64_t k, int64_t i, vec x) { vstore(to + k * TILE + i, x); }
INLINE void put_across(float *to, int64_t k, int64_t i, vec x, vec y) {
  vstore(to + k * TILE + i, x);
  vstore(to + (k + 1) * TILE + i, y);
}

#if defined(__AVX512BF16__)
INLINE void put_row(pair *to, int64_t k, int64_t i, vec x) {
  _mm256_storeu_si256((__m256i *)(to + k * TILE + i / 2), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
INLINE void put_across(pair *to, int64_t k, int64_t i, vec x, vec y) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  _mm512_storeu_si512(to + k / 2 * TILE + i, _mm512_permutexvar_epi16(order, both));
}
#endif

// From logits and dO.V: P and dS; the gradient of the logits stays in `grads` when somebody wants it.
template <bool EXACT, class E>
NOINLINE void differentiate(const Attention &p, int64_t count, int64_t lanes, const float *s, float *grads,
                            const float *softcap, const float *lse, const float *delta, E *probability, E *across,
                            E *down) {
  const float scale = (float)p.scale;
  const bool keep = p.grad_bias != 0;
  for (int64_t k = 0; k < count; k += 2)
    for (int64_t i = 0; i < lanes; i += W) {
      const vec base = vload(lse + i), less = vload(delta + i);
      vec ds[2] = {};
      for (int64_t j = 0; j < min_of(2, count - k); j++) {
        const int64_t at = (k + j) * TILE + i;
        vec x = exp2_of<EXACT>(vload(s + at) - base);
        vec d = x * (vload(grads + at) - less);
        if (keep) vstore(grads + at, d);
        if (softcap) d *= vload(softcap + at);
        ds[j] = d * scale;
        put_row(probability, k + j, i, x);
        put_row(across, k + j, i, ds[j]);
      }
      put_across(down, k, i, ds[0], ds[1]);
    }
}

// Add the gradients of the logits to those of the bias.
static void add_bias_grad(const Attention &p, const Unit &u, const Keys &keys, const Tile &t, int64_t panel,
                          int64_t part, const Sight &sight, const float *grads) {
  const int64_t *step = p.grad_bias_strides, rows = min_of(TILE, u.rows - panel * TILE);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = p.grad_bias_by_head ? keys.row_head[panel * TILE + r] : u.kv_head;
    float *to = p.grad_bias + u.b * step[0] + head * step[1] + part * step[2];
    to += keys.row_query[panel * TILE + r] * step[3];
    for (int64_t k = 0; k < t.count; k++)
      if (sight.bits[k] >> r & 1) to[t.at[k]] += grads[k * TILE + r];
  }
}

template <class T, class E>
static void attend(const Attention &p, const Unit &u, const Tile &t, int64_t part, float *sums, Work<T, E> &w) {
  const int64_t dims = in_elements<E>(p.dim), value_dims = in_elements<E>(p.value_dim);
  const int64_t panels = ceil_div(u.rows, TILE), key_lanes = padded(p.dim), value_lanes = padded(p.value_dim);
  uint64_t seen[TILE] = {};
  bool whole = false;
  for (int64_t panel = 0; panel < panels; panel++) {
    Sight &sight = w.sights[panel];
    if (p.bias) take_bias(p, u, w.keys, t, panel, w.bias);
    see(p, u, w.keys, t, panel, p.bias ? w.bias : 0, sight);
    whole |= sight.all;
    if (!sight.all)
      for (int64_t k = 0; k < t.count; k++) seen[k] |= sight.bits[k];
  }
  const uint64_t *by_key = whole ? 0 : seen;
  take_rows<T, E>(p.value, p.value_strides, u, t, by_key, p.value_dim, w.value, w.zeros, w.rows, w.value_rows);
  take_rows<T, E>(p.key, p.key_strides, u, t, by_key, p.dim, w.key, w.zeros, w.rows, w.key_rows);
  lay_keys(w, t, p.dim);
  for (int64_t k = 0; k < t.count; k++) {
    w.key_sums[k] = sums + t.at[k] * (key_lanes + value_lanes);
    w.value_sums[k] = w.key_sums[k] + key_lanes;
  }
  const bool plain = p.softcap == 0 && !p.bias;
  const float scale = (float)(plain ? p.scale * (double)LOG2E : p.scale);
  for (int64_t panel = 0; panel < panels; panel++) {
    const Sight &sight = w.sights[panel];
    if (sight.none) continue;
    const int64_t rows = min_of(TILE, u.rows - panel * TILE), lanes = ceil_div(rows, W) * W;
    product<false, REPLACE>(w.key_rows, t.count, dims, w.query + panel * dims * TILE, TILE, 0, lanes, w.logit_rows,
                            scale);
    product<false, REPLACE>(w.value_rows, t.count, value_dims, w.grad + panel * value_dims * TILE, TILE, 0, lanes,
                            w.grad_rows);
    if (p.bias) take_bias(p, u, w.keys, t, panel, w.bias);
    float *softcap = p.softcap != 0 ? w.softcap : 0;
    if (!plain || !sight.all) finish_logits(p, 0, t.count, 0, lanes, p.bias ? w.bias : 0, sight, w.logits, softcap);
    differentiate<Per<E>::elements == 1>(p, t.count, lanes, w.logits, w.grads, softcap, w.lse + panel * TILE,
                                         w.delta + panel * TILE, w.probability, w.slope_across, w.slope_down);
    if (p.grad_bias) add_bias_grad(p, u, w.keys, t, panel, part, sight, w.grads);
    const int64_t deep = in_elements<E>(rows), from = panel * TILE;
    product<false, ADD>(w.probability_rows, t.count, deep, w.grad_down + from * value_lanes, value_lanes, 0,
                        value_lanes, w.value_sums);
    product<false, ADD>(w.slope_rows, t.count, deep, w.query_down + from * key_lanes, key_lanes, 0, key_lanes,
                        w.key_sums);
    product<true, ADD>(w.key_across, p.dim, in_elements<E>(t.count), w.slope_down, TILE, 0, lanes,
                       w.query_sums + panel * p.dim);
  }
}

// Lay out what a unit's tiles need of its queries: both operands, log-sum-exp times log2(e), delta.
template <class T, class E>
static void take_queries(const Attention &p, const Unit &u, Work<T, E> &w) {
  const int64_t dims = in_elements<E>(p.dim), value_dims = in_elements<E>(p.value_dim);
  const int64_t strides[3] = {p.heads * p.queries * p.value_dim, p.queries * p.value_dim, p.value_dim};
  for (int64_t panel = 0; panel * TILE < u.rows; panel++) {
    const int64_t from = panel * TILE, count = min_of(TILE, u.rows - from);
    // The buffers of keys and values are free until the first tile.
    take_panel<T, E>(p.query, p.query_strides, u, w.keys, panel, p.dim, w.key, w.rows, w.panel_rows);
    pack_across(w.panel_rows, count, dims, w.query + from * dims, TILE);
    lay_down(w.rows, count, p.dim, w.zeros, w.query_down + from * padded(p.dim));
    take_panel<T, E>(p.grad_out, strides, u, w.keys, panel, p.value_dim, w.value, w.rows, w.panel_rows);
    for (int64_t i = 0; i < TILE; i++) {
      w.lse[from + i] = __builtin_inff();
      w.delta[from + i] = 0;
      if (i >= count) continue;
      const int64_t row = (u.b * p.heads + w.keys.row_head[from + i]) * p.queries + w.keys.row_query[from + i];
      if (p.lse[row] == -__builtin_inff()) {  // it saw nothing, and whatever comes back counts for nothing
        w.rows[i] = w.zeros;
        w.panel_rows[i] = as_elements(w.zeros, p.value_dim, w.value + i * value_dims);
        continue;
      }
      w.lse[from + i] = p.lse[row] * LOG2E;
      w.delta[from + i] = dot(w.rows[i], (const T *)p.out + row * p.value_dim, p.value_dim);
      if (p.grad_lse) w.delta[from + i] -= p.grad_lse[row];
    }
    pack_across(w.panel_rows, count, value_dims, w.grad + from * value_dims, TILE);
    lay_down(w.rows, count, p.value_dim, w.zeros, w.grad_down + from * padded(p.value_dim));
  }
}

template <class T, class E>
static void run_unit(const Attention &p, const Unit &u, int64_t part, float *sums, Work<T, E> &w) {
  if (!u.count) return;
  w.keys.find(p, u);
  memset(w.grad_query, 0, ceil_div(u.rows, TILE) * p.dim * TILE * sizeof(float));
  if (w.keys.count) take_queries(p, u, w);
  for (int64_t first = 0; first < w.keys.count;) {
    Tile t = tile_at(p, u, w.keys, first);
    attend(p, u, t, part, sums, w);
    first += t.count;
  }
  int64_t rows[TILE];
  for (int64_t panel = 0; panel * TILE < u.rows; panel++) {
    const int64_t from = panel * TILE, count = min_of(TILE, u.rows - from);
    for (int64_t r = 0; r < count; r++)
      rows[r] = (u.b * p.heads + w.keys.row_head[from + r]) * p.queries + w.keys.row_query[from + r];
    write_panel(w.grad_query + from * p.dim, w.ones, count, p.dim, (T *)p.grad_query, rows);
  }
}

// Add the parts' sums of one row of keys or values, and write it.
template <class T>
static void add_parts(const float *sums, int64_t parts, int64_t step, int64_t length, T *to) {
  for (int64_t i = 0; i < length; i += 16) {
    f32x16 total = load(sums + i);
    for (int64_t part = 1; part < parts; part++) total += load(sums + part * step + i);
    store_n(to + i, total, min_of(16, length - i));
  }
}

template <class T>
static void backward(const Attention &p, int64_t threads) {
  typedef typename Element<T>::type E;
  const Plan plan(p);
  const int64_t heads = p.batch * p.kv_heads, row = padded(p.dim) + padded(p.value_dim), step = p.keys * row;
#pragma omp parallel num_threads(threads)
  {
    Work<T, E> w;
    Arena count = {0, 0};
    w.take(count, p, plan);
    Scratch scratch(count.used);
    Arena arena = {(char *)scratch.at, 0};
    w.take(arena, p, plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * p.parts; i++) {
      const int64_t head = i / p.parts, part = i % p.parts;
      float *sums = p.sums + i * step;
      memset(sums, 0, step * sizeof(float));
      // All heads' units of the same queries are in one part: a bias that heads share gets their gradients there.
      for (int64_t chunk = part; chunk < plan.chunks; chunk += p.parts)
        for (int64_t unit = chunk; unit < plan.units_per_kv_head; unit += plan.chunks)
          run_unit(p, unit_at(p, plan, head / p.kv_heads, head % p.kv_heads, unit), part, sums, w);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * p.keys; i++) {
      const float *sums = p.sums + i / p.keys * p.parts * step + i % p.keys * row;
      add_parts(sums, p.parts, step, p.dim, (T *)p.grad_key + i * p.dim);
      add_parts(sums + padded(p.dim), p.parts, step, p.value_dim, (T *)p.grad_value + i * p.value_dim);
    }
  }
}

}  // namespace

PAUCITY_KERNEL(attention_backward)(const Attention *p, int64_t threads) {
  if (p->size != (int64_t)sizeof(Attention)) return BAD_STRUCTURE;
  if (!positions_fit(*p)) return BAD_POSITION;
  if (p->dtype == F32)
    backward<float>(*p, threads);
  else
    backward<bf16>(*p, threads);
  return 0;
}
