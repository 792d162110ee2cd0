// Kernel body of build_tree: one block a batch row; candidates are ranked by counting, nodes numbered by
// popcounts.
#pragma once

#include "logits.cuh"
#include "ops.h"

namespace vispec::kernels {

constexpr uint32_t kMaxTreeWords = 4;  // T <= 256

inline size_t build_tree_shared_bytes(int64_t N, int64_t T) {
  return vs::shared_bytes<uint64_t>(N) + vs::shared_bytes<uint32_t>((N + 31) / 32) +
         vs::shared_bytes<int>(N) + vs::shared_bytes<int>(T);
}

VS_KERNEL void VS_BOUNDS(1024, 1) build_tree_rows(BuildTree p) {
  const uint32_t N = static_cast<uint32_t>(p.N), T = static_cast<uint32_t>(p.T),
                 W = static_cast<uint32_t>(p.W);
  const uint32_t words = (N + 31) / 32;
  vs::Shared shared;
  uint64_t* ranks = shared.array<uint64_t>(N);
  uint32_t* kept = shared.array<uint32_t>(words);  // bit c: candidate c is in the tree
  int* node_of = shared.array<int>(N);             // node of candidate c; 0, the root, where it is not kept
  int* parent_of = shared.array<int>(T);
  const int64_t b = vs::block_index().x;
  const uint32_t thread = vs::thread_index(), threads = vs::thread_count(), lane = vs::lane_index();
  const int64_t* tokens = p.candidate_tokens + b * p.N;
  const int64_t* parents = p.candidate_parents + b * p.N;

  for (uint32_t c = thread; c < N; c += threads) {
    const float score = p.candidate_scores[b * p.N + c];
    ranks[c] = rank_key(order_key(vs::is_nan(score) ? -vs::infinity() : score), c);
  }
  vs::sync_block();
  // Whole warps go round together, so that a ballot gives one word of `kept`.
  for (uint32_t word = vs::warp_index(); word < words; word += vs::warp_count()) {
    const uint32_t c = word * 32 + lane;
    uint32_t better = 0;
    if (c < N) {
      const uint64_t rank = ranks[c];
      for (uint32_t i = 0; i < N; ++i) better += ranks[i] > rank;
    }
    const uint32_t votes = vs::ballot(c < N && better < T - 1);
    if (lane == 0) kept[word] = votes;
  }
  vs::sync_block();
  for (uint32_t c = thread; c < N; c += threads) {
    int node = 0;
    if ((kept[c / 32] >> (c % 32) & 1u) != 0) {
      node = 1 + vs::count_bits(kept[c / 32] & ((1u << (c % 32)) - 1u));
      for (uint32_t word = 0; word < c / 32; ++word) node += vs::count_bits(kept[word]);
    }
    node_of[c] = node;
  }
  vs::sync_block();
  for (uint32_t c = thread; c < N; c += threads) {
    const int node = node_of[c];
    if (node == 0) continue;
    // A kept candidate's parent is kept and precedes it; anything else hangs on the root.
    const int64_t parent = parents[c];
    const int above = parent >= 0 && parent < c ? node_of[parent] : 0;
    const int64_t out = b * p.T + node;
    p.tokens[out] = tokens[c];
    p.parents[out] = above;
    p.scores[out] = key_value(static_cast<uint32_t>(ranks[c] >> 32));
    parent_of[node] = above;
  }
  if (thread == 0) {
    p.tokens[b * p.T] = p.root_tokens[b];
    p.parents[b * p.T] = -1;
    p.scores[b * p.T] = 0.0f;
    parent_of[0] = -1;
  }
  vs::sync_block();
  for (uint32_t node = thread; node < T; node += threads) {
    uint64_t bits[kMaxTreeWords] = {0, 0, 0, 0};
    int64_t depth = -1;
    for (int at = static_cast<int>(node); at >= 0; at = parent_of[at]) {
      VS_UNROLL
      for (int w = 0; w < static_cast<int>(kMaxTreeWords);
           ++w) {  // no index at run time: bits stay in registers
        bits[w] |= at / 64 == w ? uint64_t{1} << (at % 64) : uint64_t{0};
      }
      ++depth;
    }
    p.depths[b * p.T + node] = depth;
    VS_UNROLL
    for (uint32_t w = 0; w < kMaxTreeWords; ++w) {
      if (w < W) p.ancestors[(b * p.T + node) * p.W + w] = static_cast<int64_t>(bits[w]);
    }
  }
}

}  // namespace vispec::kernels
