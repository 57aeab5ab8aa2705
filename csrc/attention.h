// What the forward and the backward pass of sparse attention share: their arguments, how the work is cut into units,
// which keys a unit needs, tile by tile, and which lane sees which key.
//
// Queries lie in the lanes of all tiles, keys in the rows, so that neither keys nor values are transposed, and maxima
// and sums of the softmax run down the lanes.
#pragma once

#include "pack.h"

// The arguments, laid out as in kernels/attention/native.py. Strides count elements; the last dimension is contiguous.
struct Attention {
  int64_t size;  // of this structure, as the caller knows it
  int64_t dtype, batch, heads, kv_heads, queries, keys, dim, value_dim;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch, head, token
  const void *query, *key, *value;
  double scale, softcap;   // softcap 0 is none
  int64_t causal, window;  // window 0 is none
  const uint8_t *padding;  // [batch, keys], or null
  const float *bias;       // or null
  int64_t bias_strides[3];  // batch, head, query; 0 where one is shared
  int64_t kind, pattern_batch, pattern_heads, q_block, k_block, num_blocks, width;
  const uint8_t *blocks;      // [pattern_batch, pattern_heads, num_blocks, width]
  const int32_t *partial;     // the same, or null
  const uint8_t *elements;    // [any, q_block, k_block]
  const int32_t *positions;   // [pattern_batch, pattern_heads, num_blocks, width]
  const int64_t *sink_end;    // [pattern_batch], the position after the last sink
  int64_t window_size;
  void *out;   // [batch, heads, queries, value_dim]
  float *lse;  // [batch, heads, queries]
  // The backward pass; `out` and `lse` are then read.
  const void *grad_out;   // as out
  const float *grad_lse;  // as lse, or null
  int64_t parts;          // a key-value head's units are summed in so many parts, then these are added
  float *sums;            // [batch, kv_heads, parts, keys, padded dim + padded value_dim]
  void *grad_query, *grad_key, *grad_value;
  float *grad_bias;  // [batch, heads or kv_heads, parts or 1, queries or 1, keys], or null
  int64_t grad_bias_strides[4];  // batch, head, part, query
  int64_t grad_bias_by_head;     // whether its second dimension counts heads
};

namespace {

enum Kind { BLOCKS = 0, LISTS = 1, WINDOW = 2 };

constexpr int64_t TILE = 64;        // keys in a tile, and queries in a panel
constexpr int64_t HALF = TILE / 2;  // of a panel
constexpr int64_t UNIT_ROWS = 128;  // most queries of a head in a unit
constexpr int64_t STACKED = 512;    // most queries of all heads in a unit
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// The kernels' code for arguments that do not fit.
enum { BAD_STRUCTURE = 1, BAD_POSITION = 2 };

// How a problem is cut: heads that share keys and pattern go together.
struct Plan {
  int64_t group, stack, stacks, block, cuts, chunks, units_per_kv_head, most_rows, most_panels;

  explicit Plan(const Attention &p) {
    group = p.heads / p.kv_heads;
    block = max_of(1, p.kind == WINDOW ? UNIT_ROWS : min_of(p.q_block, p.queries));
    int64_t rows = max_of(1, min_of(min_of(block, UNIT_ROWS), p.queries));
    bool shares = p.kind == WINDOW || p.pattern_heads != p.heads || group == 1;
    stack = shares ? max_of(1, min_of(group, STACKED / rows)) : 1;
    stacks = ceil_div(group, stack);
    cuts = ceil_div(block, UNIT_ROWS);
    chunks = ceil_div(p.queries, block) * cuts;
    units_per_kv_head = stacks * chunks;
    most_rows = stack * rows;
    most_panels = ceil_div(most_rows, TILE);
  }
};

// Some queries of some heads of one key-value head; row r is query `start + r % count` of head `head + r / count`.
struct Unit {
  int64_t b, kv_head, head, heads, block, start, count, rows;
};

static Unit unit_at(const Attention &p, const Plan &plan, int64_t b, int64_t kv_head, int64_t index) {
  Unit u;
  u.b = b;
  u.kv_head = kv_head;
  int64_t stack = index / plan.chunks, chunk = plan.chunks - 1 - index % plan.chunks;  // the longest first
  u.head = kv_head * plan.group + stack * plan.stack;
  u.heads = min_of(plan.stack, (kv_head + 1) * plan.group - u.head);
  u.block = chunk / plan.cuts;
  u.start = u.block * plan.block + chunk % plan.cuts * UNIT_ROWS;
  int64_t stop = min_of(min_of(u.start + UNIT_ROWS, (u.block + 1) * plan.block), p.queries);
  u.count = max_of(stop - u.start, 0);
  u.rows = u.heads * u.count;
  return u;
}

// The keys that any query of a unit may need, ascending, and which row sees which.
struct Keys {
  int32_t *at;  // positions
  int64_t count;
  int32_t *low, *low_sink, *high;  // by row: the keys that it sees by position; none in the rows that fill a panel
  int32_t *most_low, *least_high;  // by panel, over its rows
  int32_t *row_head, *row_query;   // by row: head and query
  int64_t sink_end;
  const int32_t *partial;  // of this row of blocks

  void take(Arena &arena, const Attention &p, const Plan &plan) {
    at = arena.take<int32_t>(max_of(p.keys, p.kind == LISTS ? p.width : 0));
    low = arena.take<int32_t>(plan.most_panels * TILE);
    low_sink = arena.take<int32_t>(plan.most_panels * TILE);
    high = arena.take<int32_t>(plan.most_panels * TILE);
    most_low = arena.take<int32_t>(plan.most_panels);
    least_high = arena.take<int32_t>(plan.most_panels);
    row_head = arena.take<int32_t>(plan.most_panels * TILE);
    row_query = arena.take<int32_t>(plan.most_panels * TILE);
  }

  void find(const Attention &p, const Unit &u) {
    int64_t offset = p.keys - p.queries, first = offset + u.start, last = first + u.count - 1;
    int64_t own = p.window ? p.window : p.keys + 1;
    int64_t size = p.kind == WINDOW ? min_of(own, p.window_size) : own;
    bool causal = p.causal || p.kind == WINDOW;
    int64_t r = 0;
    for (int64_t head = u.head; head < u.head + u.heads; head++)
      for (int64_t i = 0; i < u.count; i++, r++) {
        int64_t query = first + i;
        row_head[r] = (int32_t)head;
        row_query[r] = (int32_t)(u.start + i);
        low[r] = (int32_t)max_of(0, query - size + 1);
        low_sink[r] = (int32_t)max_of(0, query - own + 1);
        high[r] = (int32_t)(causal ? query : p.keys - 1);
      }
    for (int64_t panel = 0; panel * TILE < u.rows; panel++) {
      int64_t stop = min_of(u.rows, (panel + 1) * TILE);
      most_low[panel] = 0;
      least_high[panel] = INT32_MAX;
      for (int64_t i = panel * TILE; i < stop; i++) {
        most_low[panel] = low[i] > most_low[panel] ? low[i] : most_low[panel];
        least_high[panel] = high[i] < least_high[panel] ? high[i] : least_high[panel];
      }
    }
    for (; r % TILE; r++) low[r] = low_sink[r] = INT32_MAX, high[r] = -1;
    const uint8_t *valid = p.padding ? p.padding + u.b * p.keys : 0;
    int64_t from = max_of(0, first - size + 1), until = causal ? last + 1 : p.keys;
    int64_t batch = p.pattern_batch == 1 ? 0 : u.b;
    count = sink_end = 0;
    partial = 0;
    if (p.kind == WINDOW) {
      sink_end = p.sink_end[batch];
      append(max_of(0, first - own + 1), min_of(min_of(sink_end, from), until), valid);
      append(from, until, valid);
      return;
    }
    int64_t head = p.pattern_heads == 1 ? 0 : p.pattern_heads == p.heads ? u.head : u.kv_head;
    int64_t row = ((batch * p.pattern_heads + head) * p.num_blocks + u.block) * p.width;
    if (p.kind == BLOCKS) {
      if (p.partial) partial = p.partial + row;
      for (int64_t k = from / p.k_block; k < p.width && k * p.k_block < until; k++)
        if (p.blocks[row + k]) append(max_of(k * p.k_block, from), min_of((k + 1) * p.k_block, until), valid);
    } else {
      for (int64_t k = 0; k < p.width; k++) {
        int64_t position = p.positions[row + k];
        if (position >= from && position < until && (!valid || valid[position])) at[count++] = (int32_t)position;
      }
    }
  }

  void append(int64_t from, int64_t until, const uint8_t *valid) {
    for (int64_t j = from; j < until; j++) {
      at[count] = (int32_t)j;
      count += !valid || valid[j];
    }
  }
};

// Consecutive keys of a unit; those of a block with an element mask do not mix with others.
struct Tile {
  int64_t first, count;
  const int32_t *at;
  const uint8_t *elements;  // of the block's first row and first key of the tile; null where all elements stay
  int64_t origin;           // position of the block's first key
};

static Tile tile_at(const Attention &p, const Unit &u, const Keys &keys, int64_t first) {
  Tile t = {first, min_of(TILE, keys.count - first), keys.at + first, 0, 0};
  if (!keys.partial) return t;
  int64_t block = t.at[0] / p.k_block;
  int32_t index = keys.partial[block];
  int64_t n = 1;
  for (; n < t.count; n++) {
    int64_t other = t.at[n] / p.k_block;
    if (other != block && (index >= 0 || keys.partial[other] >= 0)) break;
  }
  t.count = n;
  if (index >= 0) {
    t.elements = p.elements + (index * p.q_block + u.start - u.block * p.q_block) * p.k_block;
    t.origin = block * p.k_block;
  }
  return t;
}

// Which lanes of a panel see which keys of a tile. Along the causal border half of a panel sees fewer keys.
struct Sight {
  uint64_t bits[TILE];
  bool all, none;
  int64_t from[2], until[2];  // the keys that any lane of a half sees lie in between
};

static void see(const Attention &p, const Unit &u, const Keys &keys, const Tile &t, int64_t panel, const float *bias,
                Sight &sight) {
  const int32_t *low = keys.low + panel * TILE, *low_sink = keys.low_sink + panel * TILE;
  const int32_t *high = keys.high + panel * TILE;
  int64_t rows = min_of(TILE, u.rows - panel * TILE);
  int32_t oldest = t.at[0], newest = t.at[t.count - 1];
  sight.all = !t.elements && !bias && keys.most_low[panel] <= oldest && newest <= keys.least_high[panel];
  sight.none = false;
  for (int half = 0; half < 2; half++) sight.from[half] = 0, sight.until[half] = sight.all ? t.count : 0;
  if (sight.all) return;
  for (int64_t k = 0; k < t.count; k++) {
    int32_t position = t.at[k];
    const int32_t *lowest = position < keys.sink_end ? low_sink : low;
    uint64_t seen = 0;
#if defined(__AVX512F__)
    const __m512i here = _mm512_set1_epi32(position);
    for (int r = 0; r < TILE; r += 16) {
      __mmask16 in = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lowest + r), here);
      seen |= (uint64_t)_mm512_mask_cmple_epi32_mask(in, here, _mm512_loadu_si512(high + r)) << r;
    }
#else
    for (int r = 0; r < rows; r++) seen |= (uint64_t)(lowest[r] <= position && position <= high[r]) << r;
#endif
    if (t.elements) {
      const uint8_t *column = t.elements + (position - t.origin);
      for (int64_t r = 0; r < rows; r++)
        if (!column[(keys.row_query[panel * TILE + r] - u.start) * p.k_block]) seen &= ~(1ull << r);
    }
    if (bias)
      for (int64_t r = 0; r < rows; r++)
        if (bias[k * TILE + r] == -__builtin_inff()) seen &= ~(1ull << r);
    sight.bits[k] = seen;
    for (int half = 0; half < 2; half++)
      if (seen >> half * HALF & 0xffffffffu) {
        if (!sight.until[half]) sight.from[half] = k;
        sight.until[half] = k + 1;
      }
  }
  sight.none = !sight.until[0] && !sight.until[1];
}

// Whether every position of the lists is one; they are all that is read through unchecked.
static bool positions_fit(const Attention &p) {
  if (p.kind != LISTS) return true;
  int64_t count = p.pattern_batch * p.pattern_heads * p.num_blocks * p.width;
  int32_t most = -1;
  for (int64_t i = 0; i < count; i++) most = p.positions[i] > most ? p.positions[i] : most;
  return most < p.keys;
}

}  // namespace
