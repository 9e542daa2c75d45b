// Many rows times weights: what an encoder is made of, with all that surrounds a product.
//
// For bfloat16 a library takes passes of their own to widen rows and weights, to lay the bias out
// and to round. Here rows are widened as they are brought in order, and the bias is added as
// results are rounded. Blocks go to whichever thread is free, so that one which is held up holds no
// other up; threads beside each other write other rows, for two that write to one new page at once
// each have it cleared.
//
// float32 and bfloat16, computed in float32; AVX-512. A row's result does not depend on the rows
// beside it or on the number of threads. Called by ops/cpu/gemm.py, which checks everything.
// Source: loops around a product of tiles, doi:10.1145/1356052.1356053.

#include <algorithm>
#include <cstdint>

#include "module.h"
#include "tiles.h"

namespace {

// Rows and weights of one task, whose sums stay in the second cache.
constexpr int64_t kBlockRows = 16 * kTile;
constexpr int64_t kBlockWeights = 6 * kPanel;
// Elements that meet at once: so many of a panel of weights stay in the nearest cache.
constexpr int64_t kDepth = 128;

int64_t divided_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// out[R, N] = x[R, K] w[N, K]^T + bias[N]; K and N are whole numbers of lanes.
template <class T>
struct Product {
  using E = typename T::Element;
  const E *x, *w, *bias;
  E* out;
  int64_t num_rows, num_weights, length;

  int64_t num_panels() const { return divided_up(num_weights, kPanel); }

  // Bring a panel of weights in order, element after element of all of them, zeros for those that
  // are not there.
  void order_weights(int64_t panel, float* to) const {
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const int64_t first = panel * kPanel + lane;
      for (int64_t k = 0; k < length; k += kLanes) {
        __m512 block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++)
          block[i] = first < num_weights ? T::load_lanes(w + (first + i) * length + k)
                                         : _mm512_setzero_ps();
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++)
          _mm512_store_ps(to + (k + i) * kPanel + lane, block[i]);
      }
    }
  }

  // Compute one block of rows and weights from `n` on; `weights` are all of them, in order.
  void compute(int64_t first_row, int64_t n, const float* weights, float* rows, float* sums) const {
    const int64_t count = std::min(kBlockRows, num_rows - first_row);
    const int64_t width = std::min(kBlockWeights, num_weights - n);
    for (int64_t k = 0; k < length; k += kDepth) {
      const int64_t depth = std::min(kDepth, length - k);
      order_rows(first_row, count, k, depth, rows);
      for (int64_t at = 0; at < width; at += kPanel)
        add(rows, count, weights + (n + at) * length + k * kPanel, depth, k > 0,
            sums + at * kBlockRows);
    }
    for (int64_t row = 0; row < count; row++) finish(first_row + row, row, n, width, sums);
  }

 private:
  // Widen some elements of each row, zeros for the rows that a last tile has too many.
  void order_rows(int64_t first, int64_t count, int64_t k, int64_t depth, float* to) const {
    for (int64_t row = 0; row < divided_up(count, kTile) * kTile; row++)
      for (int64_t i = 0; i < depth; i += kLanes)
        _mm512_store_ps(
            to + row * kDepth + i,
            row < count ? T::load_lanes(x + (first + row) * length + k + i) : _mm512_setzero_ps());
  }

  static void add(const float* rows, int64_t count, const float* panel, int64_t depth, bool is_more,
                  float* sums) {
    constexpr float kKept[kTile] = {1, 1, 1, 1, 1, 1};
    for (int64_t row = 0; row < count; row += kTile)
      multiply<kVectors, kDepth, kPanel>(rows + row * kDepth, panel, kPanel, kLanes, depth,
                                         is_more ? kKept : nullptr, sums + row * kPanel);
  }

  // Add the bias to a row's sums, which lie panel by panel, and round.
  void finish(int64_t row, int64_t place, int64_t n, int64_t width, const float* sums) const {
    for (int64_t i = 0; i < width; i += kLanes) {
      const float* from = sums + (i / kPanel * kBlockRows + place) * kPanel + i % kPanel;
      const __m512 offset = bias ? T::load_lanes(bias + n + i) : _mm512_setzero_ps();
      T::store_lanes(_mm512_add_ps(_mm512_load_ps(from), offset), out + row * num_weights + n + i);
    }
  }
};

template <class T>
void linear(const void* x, const void* w, const void* bias, void* out, int64_t num_rows,
            int64_t num_weights, int64_t length, int num_threads) {
  using E = typename T::Element;
  const Product<T> product = {static_cast<const E*>(x),
                              static_cast<const E*>(w),
                              static_cast<const E*>(bias),
                              static_cast<E*>(out),
                              num_rows,
                              num_weights,
                              length};
  const int64_t panel_size = kPanel * length;
  const Numbers weights(product.num_panels() * panel_size);
#pragma omp parallel num_threads(num_threads)
  {
    const Numbers rows(kBlockRows * kDepth), sums(kBlockRows * kBlockWeights);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < product.num_panels(); panel++)
      product.order_weights(panel, weights.data() + panel * panel_size);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t n = 0; n < num_weights; n += kBlockWeights)
      for (int64_t row = 0; row < num_rows; row += kBlockRows)
        product.compute(row, n, weights.data(), rows.data(), sums.data());
  }
}

}  // namespace

PyObject* many_rows_linear(PyObject*, PyObject* args) {
  return call_linear(args, linear<Float32>, linear<BFloat16>);
}
