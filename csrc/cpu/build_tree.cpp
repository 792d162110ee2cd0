#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace vispec::cpu {
namespace {

constexpr int64_t kWordBits = 64;

void build_row(const BuildTree& op, int64_t b) {
  const float* given = op.candidate_scores + b * op.N;
  std::vector<float> scores(given, given + op.N);
  for (float& score : scores) score = std::isnan(score) ? -INFINITY : score;
  std::vector<int64_t> kept(op.N);
  for (int64_t i = 0; i < op.N; ++i) kept[i] = i;
  const auto better = [&scores](int64_t x, int64_t y) {
    return scores[x] != scores[y] ? scores[x] > scores[y] : x < y;
  };
  if (op.T - 1 < op.N) std::nth_element(kept.begin(), kept.begin() + (op.T - 1), kept.end(), better);
  kept.resize(op.T - 1);
  std::sort(kept.begin(), kept.end());

  int64_t* tokens = op.tokens + b * op.T;
  int64_t* parents = op.parents + b * op.T;
  int64_t* depths = op.depths + b * op.T;
  int64_t* ancestors = op.ancestors + b * op.T * op.W;
  std::fill(ancestors, ancestors + op.T * op.W, 0);
  tokens[0] = op.root_tokens[b];
  parents[0] = -1;
  depths[0] = 0;
  ancestors[0] = 1;
  op.scores[b * op.T] = 0;
  // Node of every kept candidate; anything else, the root's -1 included, leads to node 0.
  std::vector<int64_t> node_of(op.N, 0);
  for (int64_t node = 1; node < op.T; ++node) {
    const int64_t candidate = kept[node - 1];
    const int64_t above = op.candidate_parents[b * op.N + candidate];
    const int64_t parent = above >= 0 && above < op.N ? node_of[above] : 0;
    node_of[candidate] = node;
    tokens[node] = op.candidate_tokens[b * op.N + candidate];
    parents[node] = parent;
    depths[node] = depths[parent] + 1;
    op.scores[b * op.T + node] = scores[candidate];
    std::copy_n(ancestors + parent * op.W, op.W, ancestors + node * op.W);
    const uint64_t bit = uint64_t{1} << (node % kWordBits);
    ancestors[node * op.W + node / kWordBits] |= static_cast<int64_t>(bit);
  }
}

}  // namespace

// A few microseconds for a tree: threads would only add to it.
void build_tree(const BuildTree& op) {
  for (int64_t b = 0; b < op.B; ++b) build_row(op, b);
}

}  // namespace vispec::cpu
