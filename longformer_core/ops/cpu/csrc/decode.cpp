// Few rows times many: what a decoder's step is made of on a CPU, at the speed of its memory.
//
// A step multiplies a handful of rows with every weight and lets them attend to every key, so the
// time to read those is the least it can take. Libraries for matrix products pack their operands
// first, which pays for many rows and not for few. Here four rows meet four weights (or keys) at
// once, straight from where they lie, and what comes next is fetched ahead.
//
// float32 and bfloat16, sums in float32; AVX-512. A row's result does not depend on the rows beside
// it or on the number of threads. Called by ops/cpu/decode.py, which checks everything.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "avx512.h"
#include "module.h"

namespace {

// Rows and weights that meet at once: 16 sums, half of the registers.
constexpr int64_t kTile = 4;
// Keys between two rescalings of the softmax; their scores and values stay in the nearest cache.
constexpr int64_t kBlock = 128;
// Keys of one task: long sources are shared by threads even if there are few heads.
constexpr int64_t kPart = 4096;
// Weights of one task.
constexpr int64_t kWeights = 32;
// Bytes between what is multiplied and what is fetched, longer than memory takes to answer.
constexpr int64_t kAhead = 8192;

// Ask for the elements that will follow these, a chunk of them.
template <class E>
inline void fetch_ahead(const E* from) {
  const char* ahead = reinterpret_cast<const char*>(from) + kAhead;
  for (size_t byte = 0; byte < kChunk * sizeof(E); byte += 64)
    _mm_prefetch(ahead + byte, _MM_HINT_T0);
}

template <class T>
using Rows = const typename T::Element* [kTile];

// Return in lane i the sum over lanes of sums[i].
inline __m512 sum_each(__m512 (&sums)[16]) {
  // Each step folds two vectors into one: halves, quarters, pairs, single lanes.
  for (int i = 0; i < 8; i++) {
    const __m512 low = _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0x44);
    const __m512 high = _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0xee);
    sums[i] = _mm512_add_ps(low, high);
  }
  const __m512i even4 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i odd4 =
      _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++) {
    const __m512 low = _mm512_permutex2var_ps(sums[i], even4, sums[i + 4]);
    const __m512 high = _mm512_permutex2var_ps(sums[i], odd4, sums[i + 4]);
    sums[i] = _mm512_add_ps(low, high);
  }
  for (int i = 0; i < 2; i++) {
    const __m512 low = _mm512_shuffle_ps(sums[i], sums[i + 2], 0x44);
    const __m512 high = _mm512_shuffle_ps(sums[i], sums[i + 2], 0xee);
    sums[i] = _mm512_add_ps(low, high);
  }
  const __m512i even = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i odd = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  return _mm512_add_ps(_mm512_permutex2var_ps(sums[0], even, sums[1]),
                       _mm512_permutex2var_ps(sums[0], odd, sums[1]));
}

// Return in lane 4 r + j the product of xs[r] and ws[j], over `length` elements. What follows ws is
// fetched for the first rows alone: others find it near by.
template <class T>
inline __m512 products(const Rows<T>& ws, const Rows<T>& xs, int64_t length, bool are_first_rows) {
  __m512 sums[kTile * kTile];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < length; at += kChunk) {
    Pair w[kTile];
    for (int j = 0; j < kTile; j++) {
      if (are_first_rows) fetch_ahead(ws[j] + at);
      w[j] = T::load(ws[j] + at);
    }
    for (int r = 0; r < kTile; r++) {
      const Pair x = T::load(xs[r] + at);
      for (int j = 0; j < kTile; j++) {
        sums[kTile * r + j] = _mm512_fmadd_ps(w[j].a, x.a, sums[kTile * r + j]);
        sums[kTile * r + j] = _mm512_fmadd_ps(w[j].b, x.b, sums[kTile * r + j]);
      }
    }
  }
  return sum_each(sums);
}

// Point at kTile rows from `first` on; the last one stands in for those that are not there.
template <class T>
inline void point(Rows<T>& rows, const typename T::Element* base, int64_t first, int64_t count,
                  int64_t stride) {
  for (int64_t i = 0; i < kTile; i++) rows[i] = base + std::min(first + i, count - 1) * stride;
}

// out[R, N] = x[R, K] w[N, K]^T + bias[N], for the weights from `first` to `last`.
template <class T>
void linear_part(const typename T::Element* x, const typename T::Element* w,
                 const typename T::Element* bias, typename T::Element* out, int64_t num_rows,
                 int64_t num_weights, int64_t length, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n += kTile) {
    Rows<T> ws, xs;
    point<T>(ws, w, n, num_weights, length);
    for (int64_t r = 0; r < num_rows; r += kTile) {
      point<T>(xs, x, r, num_rows, length);
      float sums[kTile * kTile];
      _mm512_storeu_ps(sums, products<T>(ws, xs, length, r == 0));
      for (int64_t i = 0; i < std::min(kTile, num_rows - r); i++)
        for (int64_t j = 0; j < std::min(kTile, last - n); j++) {
          const float offset = bias ? T::widen(bias[n + j]) : 0.0f;
          out[(r + i) * num_weights + n + j] = T::narrow(sums[kTile * i + j] + offset);
        }
    }
  }
}

template <class T>
void linear(const void* x, const void* w, const void* bias, void* out, int64_t num_rows,
            int64_t num_weights, int64_t length, int num_threads) {
  using E = typename T::Element;
  const int64_t num_tasks = (num_weights + kWeights - 1) / kWeights;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
  for (int64_t task = 0; task < num_tasks; task++)
    linear_part<T>(static_cast<const E*>(x), static_cast<const E*>(w), static_cast<const E*>(bias),
                   static_cast<E*>(out), num_rows, num_weights, length, task * kWeights,
                   std::min((task + 1) * kWeights, num_weights));
}

// What some keys make of kTile rows: the largest score, the sum of the weights relative to it, and
// the values so weighted, in the order in which they are loaded.
struct Part {
  float* largest;
  float* sum;
  float* mixed;
};

// Turn kBlock scores of a row into weights; return what the weights before are to be multiplied by.
inline float soften(float* scores, float& largest_before, float& total) {
  __m512 top = _mm512_loadu_ps(scores);
  for (int64_t i = 16; i < kBlock; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
  const float largest = std::max(largest_before, _mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < kBlock; i += 16) {
    const __m512 weights =
        exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(largest)));
    _mm512_storeu_ps(scores + i, weights);
    sum = _mm512_add_ps(sum, weights);
  }
  const float fade = std::exp2(largest_before - largest);
  largest_before = largest;
  total = total * fade + _mm512_reduce_add_ps(sum);
  return fade;
}

// mixed[r] = fades[r] mixed[r] + sum over keys of weights[r][key] values[key], for kTile rows.
template <class T>
inline void mix(const float (&fades)[kTile], const float (&weights)[kTile][kBlock],
                const typename T::Element* values, int64_t num_keys, float* mixed,
                int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kChunk) {
    Pair sums[kTile];
    for (auto& sum : sums) sum = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t key = 0; key < num_keys; key++) {
      const auto* from = values + key * head_dim + d;
      fetch_ahead(from);
      const Pair value = T::load(from);
      for (int r = 0; r < kTile; r++) {
        const __m512 weight = _mm512_set1_ps(weights[r][key]);
        sums[r].a = _mm512_fmadd_ps(weight, value.a, sums[r].a);
        sums[r].b = _mm512_fmadd_ps(weight, value.b, sums[r].b);
      }
    }
    for (int r = 0; r < kTile; r++) {
      float* row = mixed + r * head_dim + d;
      const Pair before = Float32::load(row);
      const __m512 fade = _mm512_set1_ps(fades[r]);
      Float32::store(
          {_mm512_fmadd_ps(before.a, fade, sums[r].a), _mm512_fmadd_ps(before.b, fade, sums[r].b)},
          row);
    }
  }
}

// One document: queries and results [rows, H, D]; keys and values [H, n, D], whose heads lie
// `head_stride` elements apart.
template <class T>
struct Document {
  using E = typename T::Element;
  const E *queries, *keys, *values;
  E* out;
  int64_t num_keys, num_rows, num_heads, head_dim, head_stride;
  float scale;

  int64_t num_parts() const { return (num_keys + kPart - 1) / kPart; }
  int64_t padded_rows() const { return (num_rows + kTile - 1) / kTile * kTile; }
  // Numbers that a part takes.
  int64_t part_size() const { return padded_rows() * (head_dim + 2); }

  Part part(float* memory) const {
    return {memory, memory + padded_rows(), memory + 2 * padded_rows()};
  }

  // Compute what the keys of one part make of all rows in one head.
  void attend(int64_t head, int64_t index, float* memory) const {
    const Part all = part(memory);
    std::fill(memory, memory + part_size(), 0.0f);
    std::fill(all.largest, all.largest + padded_rows(), -INFINITY);
    const int64_t last = std::min(num_keys, (index + 1) * kPart);
    for (int64_t first = index * kPart; first < last; first += kBlock)
      for (int64_t row = 0; row < num_rows; row += kTile)
        attend_block(head, first, std::min(kBlock, last - first), row,
                     {all.largest + row, all.sum + row, all.mixed + row * head_dim});
  }

  void attend_block(int64_t head, int64_t first, int64_t count, int64_t row,
                    const Part& part) const {
    alignas(64) float scores[kTile][kBlock];
    float fades[kTile];
    const int64_t start = head * head_stride + first * head_dim;
    Rows<T> rows, some;
    point<T>(rows, queries + head * head_dim, row, num_rows, num_heads * head_dim);
    for (int64_t key = 0; key < count; key += kTile) {
      point<T>(some, keys + start, key, count, head_dim);
      float tile[kTile * kTile];
      const __m512 dots = products<T>(some, rows, head_dim, row == 0);
      _mm512_storeu_ps(tile, _mm512_mul_ps(dots, _mm512_set1_ps(scale)));
      for (int r = 0; r < kTile; r++)
        std::memcpy(&scores[r][key], tile + kTile * r, kTile * sizeof(float));
    }
    for (int r = 0; r < kTile; r++) {
      std::fill(scores[r] + count, scores[r] + kBlock, -INFINITY);
      fades[r] = soften(scores[r], part.largest[r], part.sum[r]);
    }
    mix<T>(fades, scores, values + start, count, part.mixed, head_dim);
  }

  // Join the parts of one head and write its results; zeros where there is no key.
  void finish(int64_t head, float* memory) const {
    std::vector<float> mixed(head_dim);
    for (int64_t row = 0; row < num_rows; row++) {
      float largest = -INFINITY, sum = 0.0f;
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      for (int64_t i = 0; i < num_parts(); i++)
        largest = std::max(largest, part(memory + i * part_size()).largest[row]);
      for (int64_t i = 0; i < num_parts(); i++) {
        const Part from = part(memory + i * part_size());
        const float share = std::exp2(from.largest[row] - largest);
        sum += from.sum[row] * share;
        for (int64_t d = 0; d < head_dim; d++) mixed[d] += from.mixed[row * head_dim + d] * share;
      }
      if (num_keys)
        for (float& value : mixed) value /= sum;
      E* to = out + (row * num_heads + head) * head_dim;
      for (int64_t d = 0; d < head_dim; d += kChunk) T::store(Float32::load(&mixed[d]), to + d);
    }
  }
};

template <class T>
void attend(const void* queries, const void* keys, const void* values, void* out,
            const int64_t* lengths, int64_t num_documents, int64_t num_rows, int64_t num_heads,
            int64_t head_dim, int64_t document_stride, int64_t head_stride, float scale,
            int num_threads) {
  using E = typename T::Element;
  struct Task {
    int64_t document, head, part, memory;
  };
  std::vector<Document<T>> documents;
  std::vector<Task> parts, heads;
  int64_t size = 0;
  for (int64_t i = 0; i < num_documents; i++) {
    const int64_t skipped = i * num_rows * num_heads * head_dim;
    documents.push_back({static_cast<const E*>(queries) + skipped,
                         static_cast<const E*>(keys) + i * document_stride,
                         static_cast<const E*>(values) + i * document_stride,
                         static_cast<E*>(out) + skipped, lengths[i], num_rows, num_heads, head_dim,
                         head_stride, scale * kLog2E});
    for (int64_t head = 0; head < num_heads; head++) {
      heads.push_back({i, head, 0, size});
      for (int64_t part = 0; part < documents[i].num_parts();
           part++, size += documents[i].part_size())
        parts.push_back({i, head, part, size});
    }
  }
  std::vector<float> memory(size);
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); i++) {
      const Task& task = parts[i];
      documents[task.document].attend(task.head, task.part, memory.data() + task.memory);
    }
#pragma omp for schedule(static)
    for (size_t i = 0; i < heads.size(); i++)
      documents[heads[i].document].finish(heads[i].head, memory.data() + heads[i].memory);
  }
}

}  // namespace

PyObject* few_rows_linear(PyObject*, PyObject* args) {
  return call_linear(args, linear<Float32>, linear<BFloat16>);
}

PyObject* few_rows_attend(PyObject*, PyObject* args) {
  unsigned long long queries, keys, values, out, lengths;
  long long num_documents, num_rows, num_heads, head_dim, document_stride, head_stride;
  float scale;
  int is_bfloat16, num_threads;
  if (!PyArg_ParseTuple(args, "KKKKKLLLLLLfpi", &queries, &keys, &values, &out, &lengths,
                        &num_documents, &num_rows, &num_heads, &head_dim, &document_stride,
                        &head_stride, &scale, &is_bfloat16, &num_threads))
    return nullptr;
  const auto run = is_bfloat16 ? attend<BFloat16> : attend<Float32>;
  Py_BEGIN_ALLOW_THREADS;
  run(reinterpret_cast<void*>(queries), reinterpret_cast<void*>(keys),
      reinterpret_cast<void*>(values), reinterpret_cast<void*>(out),
      reinterpret_cast<const int64_t*>(lengths), num_documents, num_rows, num_heads, head_dim,
      document_stride, head_stride, scale, num_threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}
