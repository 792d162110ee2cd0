// tree_attention against float64. Its error may be at most twice that of the plain way at the same dtype
// (products rounded, softmax in float32, weights rounded), both against float64 on the same rounded inputs.
#include <cmath>
#include <limits>
#include <vector>

#include "harness.h"
#include "ops.h"

namespace {

using test::Buffer;
using vispec::DType;

struct Case {
  int64_t B, H, G, T, S, L, head;
  std::vector<int64_t> lengths;
  bool sees_all;  // every tail slot; otherwise the ancestors of a random tree
};

unsigned state = 7;
unsigned next() { return (state = state * 1664525u + 1013904223u) >> 8; }
float uniform() { return static_cast<float>(next()) * 0x1p-23f - 1.0f; }

template <typename T>
float rounded(float x) {
  return vs::to_float(vs::from_float<T>(x));
}

// The words of T nodes over S tail slots: node t stands in slot S - T + t and sees a chain of earlier slots,
// from one of several roots.
std::vector<uint64_t> random_ancestors(const Case& c, int64_t W) {
  std::vector<uint64_t> words(static_cast<size_t>(c.B * c.T * W));
  for (int64_t b = 0; b < c.B; ++b) {
    std::vector<int64_t> parent(static_cast<size_t>(c.S), -1);
    for (int64_t s = 1; s < c.S; ++s)
      parent[static_cast<size_t>(s)] = static_cast<int64_t>(next()) % (s + 1) - 1;
    for (int64_t t = 0; t < c.T; ++t) {
      const int64_t own = c.S - c.T + t;
      for (int64_t s = c.sees_all ? c.S - 1 : own; s >= 0;
           s = c.sees_all ? s - 1 : parent[static_cast<size_t>(s)]) {
        words[static_cast<size_t>((b * c.T + t) * W + s / 64)] |= uint64_t{1} << (s % 64);
      }
    }
  }
  return words;
}

struct Row {
  const Case* c;
  const float *query, *keys, *values;  // keys, values: [L, head] of one key-value head
  std::vector<int64_t> slots;          // visible
};

// One output row in float64, and in float32 with T's rounding where plain code rounds.
template <typename T>
void attend(const Row& row, float scale, std::vector<double>& exact, std::vector<float>& plain) {
  const size_t n = row.slots.size();
  const int64_t head = row.c->head;
  std::vector<double> scores(n);
  std::vector<float> rough(n);
  double best = -1e300, total = 0;
  float rough_best = -1e30f, rough_total = 0;
  for (size_t i = 0; i < n; ++i) {
    double dot = 0;
    float rough_dot = 0;
    for (int64_t d = 0; d < head; ++d) {
      dot += static_cast<double>(row.query[d]) * row.keys[row.slots[i] * head + d];
      rough_dot += row.query[d] * row.keys[row.slots[i] * head + d];
    }
    scores[i] = dot * static_cast<double>(scale);
    rough[i] = rounded<T>(rounded<T>(rough_dot) * scale);
    best = scores[i] > best ? scores[i] : best;
    rough_best = rough[i] > rough_best ? rough[i] : rough_best;
  }
  for (size_t i = 0; i < n; ++i) {
    scores[i] = std::exp(scores[i] - best);
    rough[i] = std::exp(rough[i] - rough_best);
    total += scores[i];
    rough_total += rough[i];
  }
  exact.assign(static_cast<size_t>(head), 0);
  plain.assign(static_cast<size_t>(head), 0);
  for (size_t i = 0; i < n; ++i) {
    const float weight = rounded<T>(rough[i] / rough_total);
    for (int64_t d = 0; d < head; ++d) {
      exact[static_cast<size_t>(d)] += scores[i] / total * row.values[row.slots[i] * head + d];
      plain[static_cast<size_t>(d)] += weight * row.values[row.slots[i] * head + d];
    }
  }
  for (float& x : plain) x = rounded<T>(x);
}

template <typename T>
void check(const Case& c, DType dtype) {
  const int64_t W = (c.S + 63) / 64, group = c.H / c.G, pitch = c.head + 8;
  // Queries and outputs are [B, T, H, head] in memory, the cache [B, G, L, head + gap]: views of the kind
  // models pass.
  const T poison{0x7FFF};
  Buffer<T> queries(static_cast<size_t>(c.B * c.T * c.H * c.head)), output(queries.size(), poison);
  Buffer<T> keys(static_cast<size_t>(c.B * c.G * c.L * pitch), poison), values(keys.size(), poison);
  std::vector<float> query_floats(queries.size());
  std::vector<float> key_floats(static_cast<size_t>(c.B * c.G * c.L * c.head)),
      value_floats(key_floats.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    queries[i] = vs::from_float<T>(uniform() * 2.0f);
    query_floats[i] = vs::to_float(queries[i]);
  }
  for (int64_t row = 0; row < c.B * c.G * c.L; ++row) {
    const int64_t b = row / (c.G * c.L), slot = row % c.L;
    if (slot >= c.lengths[static_cast<size_t>(b)] + c.S) continue;  // stays NaN
    for (int64_t d = 0; d < c.head; ++d) {
      const size_t to = static_cast<size_t>(row * pitch + d), from = static_cast<size_t>(row * c.head + d);
      keys[to] = vs::from_float<T>(uniform());
      values[to] = vs::from_float<T>(uniform() + 0.2f);
      key_floats[from] = vs::to_float(keys[to]);
      value_floats[from] = vs::to_float(values[to]);
    }
  }
  const std::vector<uint64_t> words = random_ancestors(c, W);
  Buffer<int64_t> ancestors(words.size()), lengths(static_cast<size_t>(c.B));
  for (size_t i = 0; i < words.size(); ++i) ancestors[i] = static_cast<int64_t>(words[i]);
  for (size_t b = 0; b < lengths.size(); ++b) lengths[b] = c.lengths[b];

  vispec::TreeAttention p{};
  p.queries = queries.get(), p.keys = keys.get(), p.values = values.get(), p.output = output.get();
  p.query_batch_stride = p.output_batch_stride = c.T * c.H * c.head;
  p.query_head_stride = p.output_head_stride = c.head;
  p.query_row_stride = p.output_row_stride = c.H * c.head;
  p.cache_batch_stride = c.G * c.L * pitch, p.cache_head_stride = c.L * pitch, p.cache_slot_stride = pitch;
  p.dtype = dtype, p.lengths = lengths.get(), p.ancestors = ancestors.get();
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.head));
  p.B = c.B, p.H = c.H, p.G = c.G, p.T = c.T, p.S = c.S, p.L = c.L, p.W = W, p.head = c.head;
  const size_t floats = static_cast<size_t>(vispec::cuda::tree_attention_workspace_bytes(p)) / 4;
  Buffer<float> workspace(floats, std::numeric_limits<float>::quiet_NaN());
  p.workspace = workspace.get();
  vispec::cuda::tree_attention(p);
  test::wait();
  std::vector<T> first(output.get(), output.get() + output.size());
  vispec::cuda::tree_attention(p);
  test::wait();

  double error = 0, plain_error = 0;
  std::vector<double> exact;
  std::vector<float> plain;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t h = 0; h < c.H; ++h) {
        Row row{&c,
                &query_floats[static_cast<size_t>(((b * c.T + t) * c.H + h) * c.head)],
                &key_floats[static_cast<size_t>((b * c.G + h / group) * c.L * c.head)],
                &value_floats[static_cast<size_t>((b * c.G + h / group) * c.L * c.head)],
                {}};
        for (int64_t s = 0; s < c.lengths[static_cast<size_t>(b)]; ++s) row.slots.push_back(s);
        for (int64_t s = 0; s < c.S; ++s) {
          if ((words[static_cast<size_t>((b * c.T + t) * W + s / 64)] >> (s % 64) & 1) != 0) {
            row.slots.push_back(c.lengths[static_cast<size_t>(b)] + s);
          }
        }
        attend<T>(row, p.scale, exact, plain);
        for (int64_t d = 0; d < c.head; ++d) {
          const size_t at = static_cast<size_t>(((b * c.T + t) * c.H + h) * c.head + d);
          const double off = std::fabs(vs::to_float(output[at]) - exact[static_cast<size_t>(d)]);
          error = off > error || std::isnan(off) ? off : error;
          const double plain_off = std::fabs(plain[static_cast<size_t>(d)] - exact[static_cast<size_t>(d)]);
          plain_error = plain_off > plain_error ? plain_off : plain_error;
          EXPECT(first[at].bits == output[at].bits, static_cast<long long>(at));  // the same every time
        }
      }
    }
  }
  if (!(error <= 2 * plain_error)) {
    std::fprintf(stderr, "head %d, G %d, T %d, S %d: ", static_cast<int>(c.head), static_cast<int>(c.G),
                 static_cast<int>(c.T), static_cast<int>(c.S));
    std::fprintf(stderr, "error %.3g, plain %.3g\n", error, plain_error);
  }
  EXPECT(error <= 2 * plain_error, static_cast<long long>(c.head));
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 2, 2, 1, 1, 40, 64, {0}, false},            // decoding, nothing committed
      {2, 2, 2, 30, 30, 400, 128, {63, 321}, false},  // one word; a partial and several full tiles
      {3, 8, 2, 5, 5, 700, 64, {64, 1, 650}, false},  // groups of 4; three runs of keys
      {1, 7, 1, 10, 24, 90, 80, {65}, false},         // a draft level: fewer rows than tail slots
      {1, 8, 1, 9, 9, 130, 96, {120}, true},          // 72 packed rows: a second, partial row block
      {1, 1, 1, 70, 70, 200, 64, {100}, false},       // two words, more than one row block
      {1, 2, 1, 3, 256, 600, 64, {300}, false},       // four words
      {1, 2, 2, 4, 4, 300, 256, {250}, false},        // the largest head
      {1, 4, 4, 8, 8, 30, 128, {22}, false},          // up to the cache's last slot
  };
  for (const Case& c : cases) {
    check<vs::BFloat16>(c, DType::bf16);
    check<vs::Half>(c, DType::f16);
  }
  std::printf("%d failures\n", test::failures);
  return test::failures == 0 ? 0 : 1;
}
