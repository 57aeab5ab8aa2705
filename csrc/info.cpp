// What the native library was built for. Kernels join it file by file.

#define PAUCITY_API extern "C" __attribute__((visibility("default")))

// Raised whenever the meaning of an exported function changes; the loader refuses any other.
PAUCITY_API int paucity_abi_version() { return 1; }

// The widest vector instructions that this machine has, as the kernels will dispatch on them.
PAUCITY_API const char *paucity_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return "avx512-bf16";
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "plain";
}
