// Products of tiles, from operands that were brought in order: what kernels of many rows share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "avx512.h"

namespace {

// Rows and vectors that meet at once: 24 sums, three quarters of the registers.
constexpr int64_t kTile = 6;
constexpr int64_t kVectors = 4;
constexpr int64_t kPanel = kVectors * kLanes;

// Numbers whose first is the first of a line of the cache: vectors that cross one cost twice.
class Numbers {
 public:
  explicit Numbers(int64_t count) : memory_(new float[count + kLanes]) {}
  float* data() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<float[]> memory_;
};

// c[r][v] = fades[r] c[r][v] + sum over l of a[r][l] b[l][v], for kTile rows and `V` vectors;
// without `fades` c is written only. Rows of a and c lie kA and kC numbers apart, the vectors of b
// b_vector and what follows b_step. Not inline: what is around it would take registers from the
// sums.
template <int V, int64_t kA, int64_t kC>
[[gnu::noinline]] void multiply(const float* a, const float* b, int64_t b_step, int64_t b_vector,
                                int64_t length, const float* fades, float* c) {
  __m512 sums[kTile][V];
#pragma GCC unroll 6
  for (int r = 0; r < kTile; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t l = 0; l < length; l++, b += b_step) {
    __m512 bs[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) bs[v] = _mm512_loadu_ps(b + v * b_vector);
#pragma GCC unroll 6
    for (int r = 0; r < kTile; r++) {
      const __m512 x = _mm512_set1_ps(a[r * kA + l]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = _mm512_fmadd_ps(x, bs[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTile; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* to = c + r * kC + v * kLanes;
      // Added last: rounding errors grow with the number of sums that follow one another.
      if (fades)
        sums[r][v] = _mm512_fmadd_ps(_mm512_set1_ps(fades[r]), _mm512_loadu_ps(to), sums[r][v]);
      _mm512_storeu_ps(to, sums[r][v]);
    }
}

// Turn 16 vectors, of which lane j holds column j, into 16 of which lane i holds row i.
inline void transpose(__m512 (&x)[kLanes]) {
  __m512 t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  // After this each quarter q of x[4 i + j] holds rows 4 i to 4 i + 3 of column 4 q + j.
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = low(t[i], t[i + 2]);
    x[i + 1] = high(t[i], t[i + 2]);
    x[i + 2] = low(t[i + 1], t[i + 3]);
    x[i + 3] = high(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; j++) {
    const __m512 even_above = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
    const __m512 even_below = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
    const __m512 odd_above = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
    const __m512 odd_below = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even_above, even_below, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(odd_above, odd_below, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even_above, even_below, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(odd_above, odd_below, 0xdd);
  }
  std::copy(t, t + kLanes, x);
}

}  // namespace
