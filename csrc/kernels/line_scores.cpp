// Attention mass of every column and of every diagonal, over the last queries of a text, without holding the rows.
#include "../pack.h"

#include <math.h>

namespace {

constexpr int64_t TILE = 64;  // keys in a tile, and queries in a panel
constexpr float LOG2E = 1.44269504088896341f;

struct Sizes {
  int64_t batch, heads, kv_heads, rows, keys, dim, window;
  float scale, softcap;  // softcap 0 is none, window 0 as well
};

// One thread's memory.
template <class E>
struct Work {
  E *query, *row, *key;
  float *logits, *top, *sum, *diagonals;
  const E **query_rows, **key_rows;
  float **logit_rows;

  void take(Arena &arena, const Sizes &z) {
    const int64_t deep = in_elements<E>(z.dim);
    query = arena.take<E>(deep * TILE);
    row = arena.take<E>(deep * TILE);
    key = arena.take<E>(deep * TILE);
    logits = arena.take<float>(TILE * TILE);
    top = arena.take<float>(TILE);
    sum = arena.take<float>(TILE);
    diagonals = arena.take<float>(z.keys + 2 * TILE);
    query_rows = arena.take<const E *>(TILE);
    key_rows = arena.take<const E *>(TILE);
    logit_rows = arena.take<float *>(TILE);
    if (arena.base)
      for (int64_t i = 0; i < TILE; i++) logit_rows[i] = logits + i * TILE;
  }
};

// Logits of a tile times log2(e), [key][lane]; -inf where the lane's query, `lane` after position `at`, does not see it.
template <class T, class E>
static void logits_of(const Sizes &z, const T *key, int64_t first, int64_t count, int64_t at, Work<E> &w) {
  const int64_t deep = in_elements<E>(z.dim);
  for (int64_t k = 0; k < count; k++) w.key_rows[k] = as_elements(key + (first + k) * z.dim, z.dim, w.key + k * deep);
  const float scale = z.softcap == 0 ? z.scale * LOG2E : z.scale;
  product<false, REPLACE>(w.key_rows, count, deep, w.query, TILE, 0, TILE, w.logit_rows, scale);
  const bool hides = first + count - 1 > at || (z.window && first <= at + TILE - 1 - z.window);
  if (z.softcap == 0 && !hides) return;
  for (int64_t k = 0; k < count; k++) {
    uint64_t seen = ~0ull;
    const int64_t from = first + k - at, until = z.window ? from + z.window : TILE;  // lanes that see the key
    if (from > 0) seen = from < TILE ? seen << from : 0;
    if (until < TILE) seen &= until > 0 ? ~(~0ull << until) : 0;
    for (int64_t i = 0; i < TILE; i += W) {
      float *to = w.logits + k * TILE + i;
      vec x = vload(to);
      if (z.softcap != 0) {
        // tanh(y) = 1 - 2 / (e^(2y) + 1), without overflow
        const vec y = x * (2 * LOG2E / z.softcap);
        x = (1.0f - 2.0f / (exp2_of<true>((y > 126.0f) ? vec{} + 126.0f : y) + 1.0f)) * (z.softcap * LOG2E);
      }
      vstore(to, choose(seen >> i, x, vec{} - __builtin_inff()));
    }
  }
}

// At most 64 queries, the first of them at position `at`, which see no key before `low`.
template <class T, class E>
static void panel(const Sizes &z, const T *query, int64_t count, const T *key, int64_t at, float *columns, Work<E> &w) {
  const int64_t deep = in_elements<E>(z.dim), stop = at + count;
  const int64_t low = z.window ? max_of(0, at - z.window + 1) / TILE * TILE : 0;
  for (int64_t r = 0; r < count; r++) w.query_rows[r] = as_elements(query + r * z.dim, z.dim, w.row + r * deep);
  memset(w.query, 0, deep * TILE * sizeof(E));
  pack_across(w.query_rows, count, deep, w.query, TILE);
  for (int64_t r = 0; r < TILE; r++) w.top[r] = -__builtin_inff(), w.sum[r] = 0;
  for (int64_t first = low; first < stop; first += TILE) {
    const int64_t here = min_of(TILE, stop - first);
    logits_of(z, key, first, here, at, w);
    for (int64_t i = 0; i < TILE; i += W) {
      vec most = vload(w.top + i), total = {};
      const vec before = most;
      for (int64_t k = 0; k < here; k++) most = vmax(most, vload(w.logits + k * TILE + i));
      const vec base = (most == -__builtin_inff()) ? vec{} : most;
      for (int64_t k = 0; k < here; k++) total += exp2_of<true>(vload(w.logits + k * TILE + i) - base);
      vstore(w.sum + i, vload(w.sum + i) * exp2_of<true>(before - base) + total);
      vstore(w.top + i, most);
    }
  }
  // Lanes without a query weigh nothing.
  for (int64_t r = 0; r < TILE; r++) w.top[r] = r < count ? w.top[r] + log2f(w.sum[r]) : __builtin_inff();
  for (int64_t first = low; first < stop; first += TILE) {
    const int64_t here = min_of(TILE, stop - first);
    logits_of(z, key, first, here, at, w);
    for (int64_t k = 0; k < here; k++) {
      float *distance = w.diagonals + TILE + at - (first + k);
      vec total = {};
      for (int64_t i = 0; i < TILE; i += W) {
        const vec p = exp2_of<true>(vload(w.logits + k * TILE + i) - vload(w.top + i));
        vstore(distance + i, vload(distance + i) + p);
        total += p;
      }
      float mass = 0;
      for (int i = 0; i < W; i++) mass += total[i];
      columns[first + k] += mass;
    }
  }
}

template <class T>
static void scores(const Sizes &z, const T *query, const T *key, float *vertical, float *slash, int64_t threads) {
  typedef typename Element<T>::type E;
#pragma omp parallel num_threads(threads)
  {
    Work<E> w;
    Arena count = {0, 0};
    w.take(count, z);
    Scratch scratch(count.used);
    Arena arena = {(char *)scratch.at, 0};
    w.take(arena, z);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < z.batch * z.heads; i++) {
      const T *keys = key + i / (z.heads / z.kv_heads) * z.keys * z.dim;
      memset(w.diagonals, 0, (z.keys + 2 * TILE) * sizeof(float));
      memset(vertical + i * z.keys, 0, z.keys * sizeof(float));
      for (int64_t r = 0; r < z.rows; r += TILE)
        panel(z, query + (i * z.rows + r) * z.dim, min_of(TILE, z.rows - r), keys, z.keys - z.rows + r,
              vertical + i * z.keys, w);
      memcpy(slash + i * z.keys, w.diagonals + TILE, z.keys * sizeof(float));
    }
  }
}

}  // namespace

// `query` [batch, heads, rows, dim], the last ones; `key` [batch, kv_heads, keys, dim]; sums [batch, heads, keys].
PAUCITY_KERNEL(line_scores)
(const void *query, const void *key, float *vertical, float *slash, float scale, float softcap, int64_t window,
 int64_t batch, int64_t heads, int64_t kv_heads, int64_t rows, int64_t keys, int64_t dim, int64_t dtype,
 int64_t threads) {
  const Sizes z = {batch, heads, kv_heads, rows, keys, dim, window, scale, softcap};
  if (dtype == BF16)
    scores(z, (const bf16 *)query, (const bf16 *)key, vertical, slash, threads);
  else
    scores(z, (const float *)query, (const float *)key, vertical, slash, threads);
  return 0;
}
