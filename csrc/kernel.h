// What every kernel file shares. A file in kernels/ is compiled once per instruction set; its exports carry the set's
// name. All else must have internal linkage (static, or in an unnamed namespace) and no function of the C++ library may
// be instantiated here: the linker would keep one copy of it, perhaps one that this machine cannot run.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAUCITY_JOIN_(a, b) a##b
#define PAUCITY_JOIN(a, b) PAUCITY_JOIN_(a, b)

// PAUCITY_KERNEL(name)(arguments...) { ... } defines paucity_name_<set>. It returns 0, or a code of its own for what was
// wrong before it read or wrote any data but the indices.
#define PAUCITY_KERNEL(name) \
  extern "C" __attribute__((visibility("default"))) int PAUCITY_JOIN(paucity_##name##_, PAUCITY_SET)

#define INLINE static inline __attribute__((always_inline))

// Element types as the callers number them.
enum DType { F32 = 0, BF16 = 1 };

// A bfloat16 in memory.
struct bf16 {
  uint16_t bits;
};

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-byte aligned scratch of one thread, freed at the end of the scope.
struct Scratch {
  void *at;
  explicit Scratch(size_t bytes) : at(aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (at) return;
    fprintf(stderr, "paucity: out of memory: a kernel needs %zu bytes of scratch\n", bytes);
    abort();
  }
  ~Scratch() { free(at); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
};
