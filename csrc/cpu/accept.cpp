#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pool.h"
#include "cpu/rows.h"
#include "ops.h"
#include "sampling.h"

namespace vispec::cpu {
namespace {

struct Settings {
  float temperature, top_p, min_p;
  int64_t top_k, seed;
};

// Memory of one thread's draws, kept from call to call.
struct Scratch {
  std::vector<float> scores, block_max, heap;
  std::vector<int64_t> weights, tied;
};

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

// The k-th largest score, counting equal ones apart. Blocks whose maximum does not beat the k-th largest so
// far are skipped, which after a few blocks is nearly all of them.
float kth_largest(Scratch& s, int64_t V, int64_t k) {
  std::vector<float>& kept = s.heap;
  kept.clear();
  float lowest = -INFINITY;
  const auto shrink = [&] {
    if (static_cast<int64_t>(kept.size()) < k) return;
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), std::greater<float>());
    kept.resize(k);
    lowest = kept[k - 1];
  };
  for (int64_t start = 0; start < V; start += kBlock) {
    if (s.block_max[start / kBlock] <= lowest) continue;
    for (int64_t i = start; i < std::min(start + kBlock, V); ++i)
      if (s.scores[i] > lowest) kept.push_back(s.scores[i]);
    if (static_cast<int64_t>(kept.size()) >= 2 * k) shrink();
  }
  shrink();
  return lowest;
}

// Removes tokens in ascending order (score, then index) while their sum is at most (1 - top_p) of `total`,
// never the last. Read from the top: a token stays while the weight above it is below total - limit. Only the
// bucket in which that point lies needs sorting.
void keep_top_p(Scratch& s, int64_t V, float best, float top_p, int64_t total) {
  constexpr int64_t kBuckets = 1024;
  const int64_t limit =
      static_cast<int64_t>(std::floor((1.0 - static_cast<double>(top_p)) * static_cast<double>(total)));
  // Weights vanish 32 below the best score, so 32 buckets per unit are enough.
  const auto bucket = [&](int64_t i) {
    return std::min<int64_t>(static_cast<int64_t>((best - s.scores[i]) * 32.0f), kBuckets - 1);
  };
  int64_t mass[kBuckets] = {};
  for (int64_t i = 0; i < V; ++i)
    if (s.weights[i] > 0) mass[bucket(i)] += s.weights[i];
  const int64_t needed = std::max<int64_t>(total - limit, 1);
  int64_t above = 0, last = 0;
  while (above + mass[last] < needed) above += mass[last++];

  s.tied.clear();
  for (int64_t i = 0; i < V; ++i) {
    if (s.weights[i] == 0) continue;
    const int64_t at = bucket(i);
    if (at == last) s.tied.push_back(i);
    if (at > last) s.weights[i] = 0;
  }
  std::sort(s.tied.begin(), s.tied.end(), [&s](int64_t x, int64_t y) {
    return s.scores[x] != s.scores[y] ? s.scores[x] > s.scores[y] : x > y;
  });
  for (const int64_t i : s.tied) {
    const int64_t weight = s.weights[i];
    if (above >= needed) s.weights[i] = 0;
    above += weight;
  }
}

// The lowest index whose cumulative weight exceeds floor(uniform * total).
int64_t pick(const std::vector<int64_t>& weights, int64_t V, int64_t total, double uniform) {
  const int64_t target = static_cast<int64_t>(std::floor(uniform * static_cast<double>(total)));
  constexpr int64_t kStep = 64;
  int64_t before = 0;
  for (int64_t start = 0; start < V; start += kStep) {
    const int64_t stop = std::min(start + kStep, V);
    int64_t sum = 0;
    for (int64_t i = start; i < stop; ++i) sum += weights[i];
    if (before + sum > target) {
      int64_t i = start;
      for (before += weights[i]; before <= target; before += weights[i]) ++i;
      return i;
    }
    before += sum;
  }
  return -1;
}

int64_t draw(const void* row, DType dtype, int64_t V, const Settings& settings, int64_t length,
             int64_t depth) {
  Scratch& s = scratch();
  s.scores.resize(V);
  s.weights.resize(V);
  s.block_max.resize((V + kBlock - 1) / kBlock);
  float best;
  if (!rows().scale(row, dtype, V, settings.temperature, s.scores.data(), s.block_max.data(), &best))
    return -1;
  const bool cut = settings.top_k > 0 && settings.top_k < V;
  const float lowest = cut ? kth_largest(s, V, settings.top_k) : -INFINITY;
  int64_t total = rows().weigh(s.scores.data(), V, best, lowest, s.weights.data());
  const bool top_p = settings.top_p < 1.0f, min_p = settings.min_p > 0.0f;
  if (top_p) keep_top_p(s, V, best, settings.top_p, total);
  if (top_p || min_p) {
    const double least = static_cast<double>(settings.min_p) * 0x1p44;
    total = 0;
    for (int64_t i = 0; i < V; ++i) {
      if (static_cast<double>(s.weights[i]) < least) s.weights[i] = 0;
      total += s.weights[i];
    }
  }
  return pick(s.weights, V, total, draw_uniform(settings.seed, length, depth));
}

// Of a token whose logit is finite, in a row without NaN or +inf: before temperature and filters.
float log_probability(const void* row, DType dtype, int64_t V, int64_t token) {
  RowPart all, own;
  all.top_k = own.top_k = 1;
  rows().scan(row, dtype, 0, V, &all);
  rows().scan(row, dtype, token, token + 1, &own);
  return own.max - all.max - static_cast<float>(std::log(all.sum));
}

void walk(const Accept& op, int64_t b) {
  const int64_t* tokens = op.tokens + b * op.T;
  const int64_t* parents = op.parents + b * op.T;
  int64_t* path = op.path + b * op.D;
  int64_t* emitted = op.emitted + b * op.D;
  std::fill(path, path + op.D, -1);
  std::fill(emitted, emitted + op.D, -1);
  float* scores = op.log_probabilities == nullptr ? nullptr : op.log_probabilities + b * op.D;
  if (scores != nullptr) std::fill(scores, scores + op.D, 0.0f);
  op.counts[b] = op.status[b] = 0;
  if (op.finished[b] != 0) return;
  Settings settings = {};
  if (op.do_sample) settings = {op.temperature[b], op.top_p[b], op.min_p[b], op.top_k[b], op.seeds[b]};

  int64_t count = 0;
  bool ended = false;
  for (int64_t node = 0; node >= 0 && count < std::min(op.D, op.remaining[b]) && !ended;) {
    const void* row = row_at(op.logits, op.dtype, b * op.logits_batch_stride + node * op.logits_row_stride);
    const int64_t token = op.do_sample ? draw(row, op.dtype, op.V, settings, op.lengths[b], count)
                                       : rows().argmax(row, op.dtype, op.V);
    if (token < 0) {
      std::fill(path, path + count, -1);
      std::fill(emitted, emitted + count, -1);
      if (scores != nullptr) std::fill(scores, scores + count, 0.0f);
      op.status[b] = 1;
      return;
    }
    if (scores != nullptr) scores[count] = log_probability(row, op.dtype, op.V, token);
    path[count] = node;
    emitted[count++] = token;
    ended = std::find(op.end_tokens, op.end_tokens + op.E, token) != op.end_tokens + op.E;
    int64_t child = 1;
    while (child < op.T && (parents[child] != node || tokens[child] != token)) ++child;
    node = child < op.T ? child : -1;
  }
  op.counts[b] = count;
  if (ended || count >= op.remaining[b]) op.finished[b] = 1;
}

void check(const char* name, double value, bool good, const char* range, int64_t b) {
  if (!good)
    throw std::invalid_argument(std::string("accept: ") + name + " must be " + range + ", got " +
                                std::to_string(value) + " in row " + std::to_string(b));
}

}  // namespace

void accept(const Accept& op) {
  for (int64_t b = 0; op.do_sample && b < op.B; ++b) {
    const float t = op.temperature[b], p = op.top_p[b], m = op.min_p[b];
    check("temperature", t, t > 0 && t <= std::numeric_limits<float>::max(), "above 0 and finite", b);
    check("top_p", p, p >= 0 && p <= 1, "from 0 to 1", b);
    check("min_p", m, m >= 0 && m <= 1, "from 0 to 1", b);
    check("top_k", static_cast<double>(op.top_k[b]), op.top_k[b] >= 0, "0 (off) or above", b);
  }
  parallel_for(op.B, [&op](int64_t b) { walk(op, b); });
}

}  // namespace vispec::cpu
