// What the native library was built for, and what this machine can run of it.

#include <string.h>

#define PAUCITY_API extern "C" __attribute__((visibility("default")))

// Raised whenever the meaning of an exported function changes; the loader refuses any other.
PAUCITY_API int paucity_abi_version() { return 2; }

static bool has(const char *set) {
  if (!strstr(PAUCITY_SETS, set)) return false;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(set, "avx2 ")) return avx2;
  if (!strcmp(set, "avx512 ")) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

namespace {

struct Sets {
  char names[64] = "";
  Sets() {
    const char *const best_first[] = {"avx512bf16 ", "avx512 ", "avx2 "};
    for (const char *set : best_first)
      if (has(set)) strcat(names, set);
    strcat(names, "plain ");
  }
};

}  // namespace

// The kernels' instruction sets that this machine has, best first, each followed by a space; made once, since threads
// ask for it at the same time.
PAUCITY_API const char *paucity_instruction_sets() {
  static const Sets sets;
  return sets.names;
}
