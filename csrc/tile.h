// Products of small matrices that stay in the cache.
//
// All products have the form C[m][lane] += sum over k of A[m][k] * B[k][lane], where the lanes are packed side by side
// and A is read through pointers to its rows, wherever these lie. An element is a float, or a pair of bfloat16 that are
// neighbours along k where the machine multiplies those.
#pragma once

#include "simd.h"

#define NOINLINE static __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int VBYTES = 64, MROWS = 6, NVECS = 4;
#elif defined(__AVX2__)
constexpr int VBYTES = 32, MROWS = 6, NVECS = 2;
#else
constexpr int VBYTES = 16, MROWS = 5, NVECS = 2;
#endif
constexpr int W = VBYTES / 4;

// As wide as the machine's registers, so that accumulators stay in them.
typedef float vec __attribute__((vector_size(VBYTES)));
typedef int32_t ivec __attribute__((vector_size(VBYTES)));

// Two neighbours along k.
struct pair {
  uint16_t first, second;
};

// What a product of inputs of type T is computed in.
template <class T>
struct Element {
  typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct Element<bf16> {
  typedef pair type;
};
#endif

template <class E>
struct Per {
  static constexpr int elements = 1;
};
template <>
struct Per<pair> {
  static constexpr int elements = 2;
};

template <class E>
INLINE int64_t in_elements(int64_t n) {
  return ceil_div(n, Per<E>::elements);
}

INLINE vec vload(const void *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void vstore(void *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec vmax(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (a > b) ? a : b;
#endif
}

// Lane i of `a` where bit i is set, else that of `b`.
INLINE vec choose(uint64_t bits, vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_mask_blend_ps((__mmask16)bits, (__m512)b, (__m512)a);
#else
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = 1 << i;
  return ((((ivec{} + (int32_t)(bits & 0xffff)) & lane) != 0)) ? a : b;
#endif
}

// 2^x for x up to 127: to 3e-6, or when EXACT to about 1 ulp; 0 below -126 (-inf included), NaN stays NaN.
template <bool EXACT>
INLINE vec exp2_of(vec x) {
#if defined(__AVX512F__)
  vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // 0 for -inf
#else
  vec low = (x < -126.0f) ? vec{} - 126.0f : x;
  vec n = (low - 0.5f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vec f = low - n;
#endif
  vec p;
  if (EXACT) {
    p = f * 0.00021702249177f + 0.001243968966f;
    p = p * f + 0.009678840797f;
    p = p * f + 0.055483342084f;
    p = p * f + 0.24022983625f;
    p = p * f + 0.69314698384f;
    p = p * f + 1.0f;
  } else {
    p = f * 0.013534160586f + 0.052011474695f;
    p = p * f + 0.24144274857f;
    p = p * f + 0.693003836f;
    p = p * f + 1.0000025933f;
  }
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  p = p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
  return (x < -126.0f) ? vec{} : p;
#endif
}

// acc + a * b, pair by pair for pairs.
INLINE vec mad(vec acc, const float *a, vec b) { return acc + b * *a; }

INLINE vec mad(vec acc, const pair *a, vec b) {
#if defined(__AVX512BF16__)
  int32_t both;
  memcpy(&both, a, sizeof both);
  return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
#else
  return acc;
#endif
}

// What becomes of C: replaced by `scale` times the product, added to, or first multiplied by `alpha`, lane by lane.
enum Update { REPLACE, ADD, RESCALE };

// M rows of C, N vectors of lanes. A[m][k] is a[m][k], or a[k][m] when ACROSS.
template <int M, int N, bool ACROSS, Update HOW, class E>
INLINE void micro(const E *const *a, int64_t first, int64_t depth, const E *b, int64_t ldb, float *const *c,
                  int64_t lane, float scale, const float *alpha) {
  vec acc[M][N];
  const E *row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    row[m] = ACROSS ? 0 : a[first + m];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      if (HOW == REPLACE)
        acc[m][n] = vec{};
      else if (HOW == ADD)
        acc[m][n] = vload(c[first + m] + lane + n * W);
      else
        acc[m][n] = vload(c[first + m] + lane + n * W) * vload(alpha + lane + n * W);
    }
  }
  b += lane;
  for (int64_t k = 0; k < depth; k++) {
    vec at[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) at[n] = vload(b + k * ldb + n * W);
    const E *across = ACROSS ? a[k] + first : 0;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const E *x = ACROSS ? across + m : row[m] + k;
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] = mad(acc[m][n], x, at[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) vstore(c[first + m] + lane + n * W, HOW == REPLACE ? acc[m][n] * scale : acc[m][n]);
}

template <int N, bool ACROSS, Update HOW, class E>
NOINLINE void columns(const E *const *a, int64_t rows, int64_t depth, const E *b, int64_t ldb, float *const *c,
                      int64_t lane, float scale, const float *alpha) {
  int64_t m = 0;
  for (; m + MROWS <= rows; m += MROWS) micro<MROWS, N, ACROSS, HOW>(a, m, depth, b, ldb, c, lane, scale, alpha);
  if (rows - m >= 4 && MROWS > 4) {
    micro<4, N, ACROSS, HOW>(a, m, depth, b, ldb, c, lane, scale, alpha);
    m += 4;
  }
  if (rows - m >= 2) {
    micro<2, N, ACROSS, HOW>(a, m, depth, b, ldb, c, lane, scale, alpha);
    m += 2;
  }
  for (; m < rows; m++) micro<1, N, ACROSS, HOW>(a, m, depth, b, ldb, c, lane, scale, alpha);
}

// C[rows][lane to lanes], `depth` elements deep, for multiples of W; `ldb` elements lie from one k of B to the next.
template <bool ACROSS, Update HOW, class E>
static void product(const E *const *a, int64_t rows, int64_t depth, const E *b, int64_t ldb, int64_t lane,
                    int64_t lanes, float *const *c, float scale = 1.0f, const float *alpha = 0) {
  for (; lane + NVECS * W <= lanes; lane += NVECS * W)
    columns<NVECS, ACROSS, HOW>(a, rows, depth, b, ldb, c, lane, scale, alpha);
  int64_t left = (lanes - lane) / W;
  if (NVECS > 3 && left == 3) columns<3, ACROSS, HOW>(a, rows, depth, b, ldb, c, lane, scale, alpha);
  if (NVECS > 2 && left == 2) columns<2, ACROSS, HOW>(a, rows, depth, b, ldb, c, lane, scale, alpha);
  if (left == 1) columns<1, ACROSS, HOW>(a, rows, depth, b, ldb, c, lane, scale, alpha);
}

}  // namespace
