// What the kernels for CPUs with AVX-512 share: element types, and powers of two.
//
// Every kernel loads elements, float32 or bfloat16, into vectors of float32 and rounds once, when
// it stores.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;
// Elements are loaded in chunks: two vectors of float32, in an order that is the same for all
// operands of a product, and undone by `store`.
constexpr int64_t kChunk = 32;

struct Pair {
  __m512 a, b;
};

struct Float32 {
  using Element = float;

  static Pair load(const Element* from) {
    return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
  }

  static void store(Pair x, Element* to) {
    _mm512_storeu_ps(to, x.a);
    _mm512_storeu_ps(to + 16, x.b);
  }

  // 16 elements in order.
  static __m512 load_lanes(const Element* from) { return _mm512_loadu_ps(from); }
  static void store_lanes(__m512 x, Element* to) { _mm512_storeu_ps(to, x); }

  static float widen(Element x) { return x; }
  static Element narrow(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;

  // Even elements, then odd ones: the upper and the lower half of each 32 bits.
  static Pair load(const Element* from) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i upper = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(upper)};
  }

  static void store(Pair x, Element* to) {
    const __m512i even = _mm512_srli_epi32(rounded(x.a), 16);
    const __m512i odd =
        _mm512_and_si512(rounded(x.b), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(to, _mm512_or_si512(even, odd));
  }

  static __m512 load_lanes(const Element* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static void store_lanes(__m512 x, Element* to) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  }

  static float widen(Element x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }

  static Element narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return static_cast<Element>((bits >> 16) | 0x40);
    return static_cast<Element>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }

 private:
  // The upper 16 bits, rounded to the nearest, to even when halfway; NaN stays NaN.
  static __m512i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x400000));
  }
};

constexpr float kLog2E = 1.44269504f;

// 2 to the power of x <= 0, within two spacings; zero below -150, NaN for NaN. Softmaxes take their
// scores times log2(e), for what a power of e takes more.
inline __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-151.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const __m512 rest = _mm512_sub_ps(x, n);
  // A polynomial for -0.5 to 0.5, of the least relative error: 2e-9 before it is rounded.
  constexpr float kTerms[] = {1.33988750e-3f, 9.61843692e-3f, 5.55033237e-2f,
                              2.40226477e-1f, 6.93147182e-1f, 1.0f};
  __m512 sum = _mm512_set1_ps(1.53533620e-4f);
  for (const float term : kTerms) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

}  // namespace
