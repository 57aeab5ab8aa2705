// Depthwise convolutions of channels-first pictures: each channel of each picture by itself, read where it lies.
#include "../simd.h"

namespace {

// Lanes [lo, hi) from p; the others are 0, and not read. 0 <= lo <= hi <= 16.
INLINE f32x16 load_part(const float *p, int64_t lo, int64_t hi) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)(((1u << hi) - 1) & ~((1u << lo) - 1)), p);
#else
  f32x16 v = {};
  memcpy((float *)&v + lo, p + lo, (hi - lo) * sizeof(float));
  return v;
#endif
}

INLINE f32x16 load_part(const bf16 *p, int64_t lo, int64_t hi) {
  u16x16 half = {};
  memcpy((uint16_t *)&half + lo, p + lo, (hi - lo) * sizeof(bf16));
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

struct Sizes {
  int64_t height, width, kh, kw, stride, pad, out_h, out_w;
};

// One picture of one channel.
template <typename T>
INLINE void picture(const T *from, T *to, const Sizes &s, f32x16 added, const float *w) {
  int64_t columns = (s.out_w - 1) * s.stride + 1;  // at stride 1, of which every stride-th stays
  for (int64_t y = 0; y < s.out_h; y++)
    for (int64_t p = 0; p < columns; p += LANES) {
      f32x16 sum = added;
      for (int64_t i = 0; i < s.kh; i++) {
        int64_t row = y * s.stride + i - s.pad;
        if (row < 0 || row >= s.height) continue;
        for (int64_t j = 0; j < s.kw; j++) {
          int64_t first = p + j - s.pad, hi = max_of(0, min_of(LANES, s.width - first));
          sum += set1(w[i * s.kw + j]) * load_part(from + row * s.width + first, min_of(hi, max_of(0, -first)), hi);
        }
      }
      int64_t n = min_of(LANES, columns - p);
      if (s.stride == 1) {
        store_n(to + y * s.out_w + p, sum, n);
        continue;
      }
      float kept[LANES];
      store(kept, sum);
      for (int64_t i = (s.stride - p % s.stride) % s.stride; i < n; i += s.stride)
        from_float(to + y * s.out_w + (p + i) / s.stride, kept[i]);
    }
}

// The same for a kernel of 3x3 and one zero on each side: each row of the picture is read once, for three rows out.
template <typename T>
INLINE void picture_3x3(const T *from, T *to, const Sizes &s, f32x16 added, const float *w) {
  f32x16 taps[9];
  for (int i = 0; i < 9; i++) taps[i] = set1(w[i]);
  for (int64_t p = 0; p < s.width; p += LANES) {
    int64_t lo = p == 0, left = min_of(LANES, s.width - p + 1), here = min_of(LANES, s.width - p);
    int64_t right = min_of(LANES, s.width - p - 1), first = (s.stride - p % s.stride) % s.stride;
    f32x16 above = {}, at = added;  // sums of the rows before and at the one that is read
    for (int64_t row = 0; row <= s.height; row++) {
      f32x16 below = added;
      if (row < s.height) {
        const T *line = from + row * s.width + p;
        f32x16 a = load_part(line - 1, lo, left), b = load_part(line, 0, here), c = load_part(line + 1, 0, right);
        above += taps[6] * a + taps[7] * b + taps[8] * c;
        at += taps[3] * a + taps[4] * b + taps[5] * c;
        below += taps[0] * a + taps[1] * b + taps[2] * c;
      }
      if (row > 0 && (row - 1) % s.stride == 0) {
        T *line = to + (row - 1) / s.stride * s.out_w;
        if (s.stride == 1) {
          store_n(line + p, above, here);
        } else {
          float kept[LANES];
          store(kept, above);
          for (int64_t i = first; i < here; i += s.stride) from_float(line + (p + i) / s.stride, kept[i]);
        }
      }
      above = at, at = below;
    }
  }
}

template <typename T>
void depthwise(const T *x, const float *weight, const T *bias, T *out, int64_t batch, int64_t channels, const Sizes &s,
               int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < batch * channels; item++) {
    int64_t c = item % channels;
    const T *from = x + item * s.height * s.width;
    const float *w = weight + c * s.kh * s.kw;
    T *to = out + item * s.out_h * s.out_w;
    f32x16 added = set1(bias ? to_float(bias[c]) : 0.0f);
    if (s.kh == 3 && s.kw == 3 && s.pad == 1) {
      picture_3x3(from, to, s, added, w);
    } else {
      picture(from, to, s, added, w);
    }
  }
}

}  // namespace

PAUCITY_KERNEL(depthwise)
(const void *x, const float *weight, const void *bias, void *out, int64_t batch, int64_t channels, int64_t height,
 int64_t width, int64_t kh, int64_t kw, int64_t stride, int64_t pad, int64_t dtype, int64_t threads) {
  Sizes sizes = {height, width, kh, kw, stride, pad};
  sizes.out_h = (height + 2 * pad - kh) / stride + 1;
  sizes.out_w = (width + 2 * pad - kw) / stride + 1;
  if (dtype == BF16)
    depthwise((const bf16 *)x, weight, (const bf16 *)bias, (bf16 *)out, batch, channels, sizes, threads);
  else
    depthwise((const float *)x, weight, (const float *)bias, (float *)out, batch, channels, sizes, threads);
  return 0;
}
