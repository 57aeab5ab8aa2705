// Sixteen floats at a time, for every instruction set: the compiler splits a vector where the machine's are narrower.
#pragma once

#include "kernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

INLINE f32x16 set1(float x) { return f32x16{} + x; }

INLINE f32x16 load(const float *p) {
  f32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE f32x16 load(const bf16 *p) {
  u16x16 half;
  memcpy(&half, p, sizeof half);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

INLINE void store(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even; NaN stays NaN.
INLINE u16x16 to_bf16(f32x16 v) {
#if defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  u32x16 bits = (u32x16)v;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32x16 quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? rounded : quiet, u16x16);
#endif
}

INLINE void store(bf16 *p, f32x16 v) {
  u16x16 half = to_bf16(v);
  memcpy(p, &half, sizeof half);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

INLINE void from_float(float *p, float x) { *p = x; }
INLINE void from_float(bf16 *p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  p->bits = (uint16_t)(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

// The first n entries (0 to 16); the rest is 0, and is not read.
INLINE f32x16 load_n(const float *p, int64_t n) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  f32x16 v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

INLINE f32x16 load_n(const bf16 *p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __m256i half = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return (f32x16)(__builtin_convertvector((u16x16)half, u32x16) << 16);
#else
  u16x16 half = {};
  memcpy(&half, p, n * sizeof(bf16));
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
#endif
}

INLINE void store_n(float *p, f32x16 v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  memcpy(p, &v, n * sizeof(float));
#endif
}

INLINE void store_n(bf16 *p, f32x16 v, int64_t n) {
  u16x16 half = to_bf16(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)half);
#else
  memcpy(p, &half, n * sizeof(bf16));
#endif
}

INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (a > b) ? a : b;
#endif
}

INLINE f32x16 abs(f32x16 a) { return (f32x16)((i32x16)a & 0x7fffffff); }

INLINE float hsum(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
#endif
}

INLINE float hmax(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// e^x to about 2 ulp; 0 below -87.3 (-inf included), +inf above 88.7, NaN stays NaN.
INLINE f32x16 exp(f32x16 x) {
  const f32x16 log2e = set1(1.44269504088896341f);
  f32x16 t = x * log2e;
#if defined(__AVX512F__)
  f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const f32x16 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  f32x16 n = (t + magic) - magic;
#endif
  f32x16 r = x - n * 0.693145751953125f;
  r = r - n * 1.428606820309417e-6f;
  f32x16 p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  f32x16 y = (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
  return (f32x16)_mm512_mask_mov_ps((__m512)y, _mm512_cmp_ps_mask((__m512)x, (__m512)set1(-87.3f), _CMP_LT_OQ),
                                    _mm512_setzero_ps());
#else
  i32x16 e = __builtin_convertvector((n < -126.0f) ? set1(-126.0f) : ((n > 128.0f) ? set1(128.0f) : n), i32x16);
  i32x16 half = e >> 1;  // 2^128 is not a float, its root is
  f32x16 y = p * (f32x16)((half + 127) << 23) * (f32x16)((e - half + 127) << 23);
  y = (x < -87.3f) ? set1(0.0f) : y;
  y = (x > 88.7f) ? set1(__builtin_inff()) : y;
  return (x == x) ? y : x;
#endif
}

}  // namespace
