// Window attention in one pass on a CPU: scores never leave the nearest cache.
//
// Two matrix products around a softmax write and read every score several times, and blocks large
// enough for them hold keys that not all of their queries see. Here 12 queries meet 64 keys at a
// time: their scores become weights and their values are added up before the next 64 come, so that
// what is computed follows the band within 16 keys.
//
// float32 and bfloat16, computed in float32; AVX-512. A document's result does not depend on the
// documents beside it or on the number of threads. Called by attention/blocked/native.py, which
// checks everything.
// Source: online softmax, arXiv:1805.02867; FlashAttention, arXiv:2205.14135.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "module.h"
#include "tiles.h"

namespace {

// Queries that meet a panel of keys while it is in the nearest cache, most of which it fills with
// its values, for heads of 64. More queries would see more keys that not all of them see.
constexpr int64_t kRows = 2 * kTile;
// Queries of one task: their keys are brought in order once.
constexpr int64_t kQueries = 2048;
// The largest head dimension.
constexpr int64_t kWidest = 128;
// Tokens between what is brought in order and what is fetched.
constexpr int64_t kAhead = 32;

// Call f with a constant of that value, 1 to kVectors.
template <class F>
inline void with_constant(int64_t value, F f) {
  switch (value) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, 4>());
  }
}

// Some queries of one head, and what the keys so far make of them.
struct Rows {
  alignas(64) float queries[kRows * kWidest];  // times scale and log2(e)
  alignas(64) float mixed[kRows * kWidest];
  __m512 sums[kRows];  // of weights relative to the largest, by lane
  float largest[kRows];
};

// Turn a row's scores of V vectors of keys into weights, zeros where it sees no key; return what is
// to become of the values before.
template <int V>
inline float soften(Rows& rows, int64_t row, uint64_t sees, float* scores) {
  __m512 s[V];
  __m512 top = _mm512_set1_ps(rows.largest[row]);
  for (int v = 0; v < V; v++) {
    const __mmask16 lanes = static_cast<__mmask16>(sees >> (v * kLanes));
    s[v] = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), lanes, scores + v * kLanes);
    // NaN as the second operand stays.
    top = _mm512_max_ps(top, s[v]);
  }
  float fade = 1.0f;
  // After a few panels the largest score is seldom a new one.
  if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(rows.largest[row]), _CMP_NEQ_UQ)) {
    const float largest = _mm512_reduce_max_ps(top);
    fade = std::exp2(rows.largest[row] - largest);
    rows.largest[row] = largest;
    rows.sums[row] = _mm512_mul_ps(rows.sums[row], _mm512_set1_ps(fade));
  }
  const __m512 largest = _mm512_set1_ps(rows.largest[row]);
  __m512 sum = rows.sums[row];
  for (int v = 0; v < V; v++) {
    const __m512 weights = exp2_of(_mm512_sub_ps(s[v], largest));
    _mm512_storeu_ps(scores + v * kLanes, weights);
    sum = _mm512_add_ps(sum, weights);
  }
  rows.sums[row] = sum;
  return fade;
}

// Keys and values of one head, brought in order: 16 keys by column after column, values by row.
struct Keys {
  float *columns, *values;

  // Let rows see V vectors of keys from `first` on, each row the keys in its mask.
  template <int V>
  void meet(Rows& rows, int64_t num_rows, int64_t first, int64_t head_dim,
            const uint64_t (&sees)[kRows]) const {
    for (int64_t row = 0; row < num_rows; row += kTile) {
      alignas(64) float scores[kTile * kPanel];
      float fades[kTile];
      multiply<V, kWidest, kPanel>(rows.queries + row * kWidest, columns + first * head_dim, kLanes,
                                   kLanes * head_dim, head_dim, nullptr, scores);
      for (int64_t r = 0; r < kTile; r++)
        fades[r] = soften<V>(rows, row + r, sees[row + r], scores + r * kPanel);
      for (int64_t d = 0; d < head_dim; d += kPanel)
        with_constant(std::min(kVectors, (head_dim - d) / kLanes), [&](auto width) {
          multiply<width, kPanel, kWidest>(scores, values + first * head_dim + d, head_dim, kLanes,
                                           V * kLanes, fades, rows.mixed + row * kWidest + d);
        });
    }
  }
};

// One head of one document: q, k, v and out point at its first token, of which each following one
// lies `stride` elements on.
template <class T>
struct Document {
  using E = typename T::Element;
  const E *q, *k, *v;
  E* out;
  float* lse;  // null if not wanted; tokens lie `num_heads` apart
  int64_t num_tokens, num_heads, head_dim, radius;
  bool is_causal;
  float scale;
  const int64_t* globals;  // ascending
  int64_t num_globals;

  int64_t stride() const { return num_heads * head_dim; }
  int64_t ahead() const { return is_causal ? 0 : radius; }

  // Compute the queries from `first` to `last`.
  void attend(int64_t first, int64_t last, float* memory) const {
    const int64_t low = first_key(first), high = std::min(num_tokens, last + ahead());
    const Keys band = order(high - low, memory, [=](int64_t i) { return low + i; });
    const Keys columns = order(num_globals, band.values + room(high - low),
                               [this](int64_t i) { return globals[i]; });
    Rows rows;
    for (int64_t at = first; at < last; at += kRows) {
      const int64_t count = std::min(kRows, last - at);
      start(rows, at, count);
      see_band(rows, at, count, band, low);
      see_globals(rows, at, count, columns);
      finish(rows, at, count);
    }
  }

  // Return how many numbers so many keys, or their values, take.
  int64_t room(int64_t num_keys) const {
    return (num_keys + kPanel - 1) / kPanel * kPanel * head_dim;
  }

  int64_t room(int64_t first, int64_t last) const {
    const int64_t num_keys = std::min(num_tokens, last + ahead()) - first_key(first);
    return 2 * (room(num_keys) + room(num_globals));
  }

 private:
  // Vectors of keys start at whole numbers of them, counted from the document's first.
  int64_t first_key(int64_t query) const {
    return std::max<int64_t>(0, query - radius) / kLanes * kLanes;
  }

  // Bring the keys at so many places in order, zeros behind them.
  template <class Place>
  Keys order(int64_t num_keys, float* memory, Place place) const {
    const Keys keys = {memory, memory + room(num_keys)};
    for (int64_t first = 0; first * head_dim < room(num_keys); first += kLanes) {
      const int64_t count = std::clamp<int64_t>(num_keys - first, 0, kLanes);
      int64_t from[kLanes];
      for (int64_t i = 0; i < count; i++) {
        from[i] = place(first + i) * stride();
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          _mm_prefetch(k + from[i] + kAhead * stride() + d, _MM_HINT_T0);
          _mm_prefetch(v + from[i] + kAhead * stride() + d, _MM_HINT_T0);
        }
      }
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        __m512 x[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++) {
          const bool is_there = i < count;
          x[i] = is_there ? T::load_lanes(k + from[i] + d) : _mm512_setzero_ps();
          const __m512 value = is_there ? T::load_lanes(v + from[i] + d) : _mm512_setzero_ps();
          _mm512_storeu_ps(keys.values + (first + i) * head_dim + d, value);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; i++)
          _mm512_storeu_ps(keys.columns + first * head_dim + (d + i) * kLanes, x[i]);
      }
    }
    return keys;
  }

  void start(Rows& rows, int64_t at, int64_t count) const {
    const __m512 factor = _mm512_set1_ps(scale * kLog2E);
    for (int64_t r = 0; r < kRows; r++) {
      rows.largest[r] = -FLT_MAX;
      rows.sums[r] = _mm512_setzero_ps();
      const E* from = q + (at + r) * stride();
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        _mm_prefetch(from + kRows * stride() + d, _MM_HINT_T0);
        const __m512 x = r < count ? T::load_lanes(from + d) : _mm512_setzero_ps();
        _mm512_store_ps(rows.queries + r * kWidest + d, _mm512_mul_ps(x, factor));
        _mm512_store_ps(rows.mixed + r * kWidest + d, _mm512_setzero_ps());
      }
    }
  }

  void see_band(Rows& rows, int64_t at, int64_t count, const Keys& keys, int64_t low) const {
    const int64_t end = std::min(num_tokens, at + count + ahead());
    for (int64_t first = first_key(at); first < end; first += kPanel) {
      uint64_t sees[kRows];
      for (int64_t r = 0; r < kRows; r++)
        sees[r] = bits(at + r - radius - first, std::min(num_tokens, at + r + ahead() + 1) - first);
      const int64_t vectors = std::min(kVectors, (end - first + kLanes - 1) / kLanes);
      with_constant(vectors, [&](auto number) {
        keys.meet<number>(rows, count, first - low, head_dim, sees);
      });
    }
  }

  // A global token in a query's band was seen there; with `is_causal` those behind are not.
  void see_globals(Rows& rows, int64_t at, int64_t count, const Keys& keys) const {
    for (int64_t first = 0; first < num_globals; first += kPanel) {
      const int64_t number = std::min(kPanel, num_globals - first);
      const int64_t *from = globals + first, *to = from + number;
      uint64_t sees[kRows];
      for (int64_t r = 0; r < kRows; r++) {
        const int64_t query = at + r;
        const auto before = std::lower_bound(from, to, query - radius) - from;
        const auto until = is_causal ? number : std::upper_bound(from, to, query + radius) - from;
        sees[r] = bits(0, number) & ~bits(before, until);
      }
      with_constant((number + kLanes - 1) / kLanes,
                    [&](auto vectors) { keys.meet<vectors>(rows, count, first, head_dim, sees); });
    }
  }

  // Return the bits from `first` to `last`, of 64.
  static uint64_t bits(int64_t first, int64_t last) {
    const auto below = [](int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; };
    return below(last) & ~below(first);
  }

  void finish(const Rows& rows, int64_t at, int64_t count) const {
    for (int64_t r = 0; r < count; r++) {
      const float sum = _mm512_reduce_add_ps(rows.sums[r]);
      const __m512 share = _mm512_set1_ps(1.0f / sum);
      for (int64_t d = 0; d < head_dim; d += kLanes)
        T::store_lanes(_mm512_mul_ps(_mm512_load_ps(rows.mixed + r * kWidest + d), share),
                       out + (at + r) * stride() + d);
      if (lse) lse[(at + r) * num_heads] = rows.largest[r] / kLog2E + std::log(sum);
    }
  }
};

// What python passes; tensors are [T, H, D], and lse is [T, H] or null.
struct Given {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const int64_t *starts, *global_starts, *globals;  // of documents, of their globals, positions
  int64_t num_documents, num_heads, head_dim, radius;
  bool is_causal;
  float scale;
  int num_threads;
};

template <class T>
void attend(const Given& given) {
  using E = typename T::Element;
  struct Task {
    Document<T> document;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  int64_t room = 0;
  // Head by head: two threads that write to one new page at once each have it cleared.
  for (int64_t head = 0; head < given.num_heads; head++)
    for (int64_t i = 0; i < given.num_documents; i++) {
      const int64_t num_tokens = given.starts[i + 1] - given.starts[i];
      for (int64_t first = 0; first < num_tokens; first += kQueries) {
        const int64_t place = given.starts[i] * given.num_heads + head;
        const int64_t skipped = place * given.head_dim;
        const Document<T> document = {
            static_cast<const E*>(given.q) + skipped,
            static_cast<const E*>(given.k) + skipped,
            static_cast<const E*>(given.v) + skipped,
            static_cast<E*>(given.out) + skipped,
            given.lse ? given.lse + place : nullptr,
            num_tokens,
            given.num_heads,
            given.head_dim,
            given.radius,
            given.is_causal,
            given.scale,
            given.globals + given.global_starts[i],
            given.global_starts[i + 1] - given.global_starts[i],
        };
        const int64_t last = std::min(first + kQueries, num_tokens);
        room = std::max(room, document.room(first, last));
        tasks.push_back({document, first, last});
      }
    }
#pragma omp parallel num_threads(given.num_threads)
  {
    const Numbers memory(room);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++)
      tasks[i].document.attend(tasks[i].first, tasks[i].last, memory.data());
  }
}

}  // namespace

PyObject* window_attend(PyObject*, PyObject* args) {
  unsigned long long q, k, v, out, lse, starts, global_starts, globals;
  long long num_documents, num_heads, head_dim, radius;
  int is_causal, is_bfloat16, num_threads;
  float scale;
  if (!PyArg_ParseTuple(args, "KKKKKKKKLLLLpfpi", &q, &k, &v, &out, &lse, &starts, &global_starts,
                        &globals, &num_documents, &num_heads, &head_dim, &radius, &is_causal,
                        &scale, &is_bfloat16, &num_threads))
    return nullptr;
  const Given given = {
      reinterpret_cast<void*>(q),
      reinterpret_cast<void*>(k),
      reinterpret_cast<void*>(v),
      reinterpret_cast<void*>(out),
      reinterpret_cast<float*>(lse),
      reinterpret_cast<const int64_t*>(starts),
      reinterpret_cast<const int64_t*>(global_starts),
      reinterpret_cast<const int64_t*>(globals),
      num_documents,
      num_heads,
      head_dim,
      radius,
      is_causal != 0,
      scale,
      num_threads,
  };
  const auto run = is_bfloat16 ? attend<BFloat16> : attend<Float32>;
  Py_BEGIN_ALLOW_THREADS;
  run(given);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}
