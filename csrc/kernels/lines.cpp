// Vertical lines and slashes of an attention map, as the ascending keys of each block of queries.
#include "../kernel.h"

namespace {

// Keys from..until - 1, by their distance to the first query of a block: negative before it.
struct Run {
  int32_t from, until;
};

// The lines of one head.
struct Lines {
  const int32_t *columns;
  const Run *runs;  // what the tiles of the slashes cover, ascending, with gaps in between
  int64_t num_columns, num_runs, keys, q_block;

  // The keys of the block of queries that begins at `start`: how many there are, and the keys if `to` is given.
  int64_t keys_of(int64_t start, int32_t *to) const {
    int64_t count = 0, c = 0;
    for (int64_t i = 0; i < num_runs; i++) {
      const int64_t from = max_of(runs[i].from + start, 0), until = min_of(runs[i].until + start, keys);
      if (until <= from) continue;
      for (; c < num_columns && columns[c] < from; c++, count++)
        if (to) to[count] = columns[c];
      if (to)
        for (int64_t j = from; j < until; j++) to[count + j - from] = (int32_t)j;
      count += until - from;
      while (c < num_columns && columns[c] < until) c++;
    }
    for (; c < num_columns && columns[c] < min_of(start + q_block, keys); c++, count++)
      if (to) to[count] = columns[c];
    return count;
  }
};

// The lines of a head from its masks by position and by distance; `columns` and `runs` have room for all.
Lines read_lines(const uint8_t *vertical, const uint8_t *slash, int64_t keys, int64_t q_block, int32_t *columns,
                 Run *runs) {
  int64_t num_columns = 0, num_runs = 0;
  for (int64_t j = 0; j < keys; j++) {
    columns[num_columns] = (int32_t)j;
    num_columns += vertical[j] != 0;
  }
  for (int64_t d = keys - 1; d >= 0; d--) {
    if (!slash[d]) continue;
    const Run tile = {(int32_t)-d, (int32_t)(q_block - d)};
    if (num_runs && tile.from <= runs[num_runs - 1].until)
      runs[num_runs - 1].until = tile.until;
    else
      runs[num_runs++] = tile;
  }
  return Lines{columns, runs, num_columns, num_runs, keys, q_block};
}

}  // namespace

// Into `counts` [heads, blocks] how many keys each block has, or, if `positions` [heads, blocks, width] is given, the
// keys: at the end of their row, behind -1. `vertical` and `slash` are [heads, keys]; the first block begins at `first`.
PAUCITY_KERNEL(lines)
(const uint8_t *vertical, const uint8_t *slash, int64_t *counts, int32_t *positions, int64_t heads, int64_t keys,
 int64_t blocks, int64_t first, int64_t q_block, int64_t width, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch a(keys * sizeof(int32_t) + 4), b(keys * sizeof(Run));
    Lines lines = {};
    int64_t known = -1;
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < heads * blocks; i++) {
      const int64_t head = i / blocks, start = first + i % blocks * q_block;
      if (head != known)
        lines = read_lines(vertical + head * keys, slash + head * keys, keys, q_block, (int32_t *)a.at, (Run *)b.at);
      known = head;
      if (!positions) {
        counts[i] = lines.keys_of(start, 0);
        continue;
      }
      int32_t *row = positions + i * width;
      const int64_t empty = width - counts[i];
      for (int64_t k = 0; k < empty; k++) row[k] = -1;
      lines.keys_of(start, row + empty);
    }
  }
  return 0;
}
