// Kernel bodies of grow_level: one block finds the best K columns of a row, a second kernel the best K
// children.
//
// One block a row reads 2 V bytes twice through L2 (0.6 MB for V = 152k); the contract gives no workspace for
// partial results of several blocks. No exponential is taken before the maximum is known, so none is wasted.
#pragma once

#include "logits.cuh"
#include "ops.h"

namespace vispec::kernels {

constexpr uint32_t kGrowThreads = 1024;
constexpr uint32_t kGrowGroups = 128;  // of 8 threads; at least K of them, and few enough to rank by counting
constexpr uint32_t kGrowList = 1024;
constexpr float kLargest = 3.402823466e38f;

inline size_t grow_rows_shared_bytes() {
  return vs::shared_bytes<uint64_t>(kGrowGroups) + vs::shared_bytes<uint64_t>(kGrowList) +
         vs::shared_bytes<uint64_t>(kGrowThreads / vs::kWarpSize) + vs::shared_bytes<uint32_t>(1);
}

inline size_t grow_select_shared_bytes(int64_t children) { return vs::shared_bytes<uint64_t>(children); }

// NaN counts as -inf, +inf as the largest float.
VS_DEVICE float usable_logit(float x) {
  if (vs::is_nan(x)) return -vs::infinity();
  return x > kLargest ? kLargest : x;
}

VS_DEVICE float usable_score(float x) { return vs::is_nan(x) ? -vs::infinity() : x; }

// A threshold at or below the K-th best column's rank key: K groups of threads have seen a column above it.
VS_DEVICE uint64_t grow_threshold(uint64_t seen, uint32_t K, uint64_t* groups, uint64_t* result) {
  constexpr uint32_t kGroup = kGrowThreads / kGrowGroups;
  VS_UNROLL
  for (uint32_t mask = kGroup / 2; mask > 0; mask /= 2) {
    const uint64_t other = vs::shuffle_xor(seen, mask);
    seen = other > seen ? other : seen;
  }
  const uint32_t thread = vs::thread_index();
  if (thread % kGroup == 0) groups[thread / kGroup] = seen;
  if (thread == 0) *result = 0;  // where fewer than K groups have a column, every column is listed
  vs::sync_block();
  if (thread < kGrowGroups && groups[thread] != 0) {
    uint32_t better = 0;
    for (uint32_t g = 0; g < kGrowGroups; ++g) better += groups[g] > groups[thread];
    if (better == K - 1) *result = groups[thread];
  }
  vs::sync_block();
  const uint64_t threshold = *result;
  vs::sync_block();
  return threshold;
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kGrowThreads, 1) grow_rows(GrowLevel p) {
  vs::Shared shared;
  uint64_t* groups = shared.array<uint64_t>(kGrowGroups);
  uint64_t* list = shared.array<uint64_t>(kGrowList);
  uint64_t* scratch = shared.array<uint64_t>(kGrowThreads / vs::kWarpSize);
  uint32_t* listed = shared.array<uint32_t>(1);

  const int64_t r = vs::block_index().x, b = vs::block_index().y;
  const uint32_t thread = vs::thread_index(), K = static_cast<uint32_t>(p.K), V = static_cast<uint32_t>(p.V);
  const T* row = static_cast<const T*>(p.logits) + b * p.logits_batch_stride + r * p.logits_row_stride;

  uint64_t seen = 0;
  for_each_column(row, 0, V, [&](float x, uint32_t column) {
    const uint64_t rank = rank_key(order_key(usable_logit(x)), column);
    seen = rank > seen ? rank : seen;
  });
  const uint64_t best = block_max(seen, scratch);
  const float top = key_value(static_cast<uint32_t>(best >> 32));
  const float base = top < -kLargest ? -kLargest : top;
  const uint64_t threshold = grow_threshold(seen, K, groups, scratch);

  if (thread == 0) *listed = 0;
  vs::sync_block();
  float sum = 0.0f;
  for_each_column(row, 0, V, [&](float x, uint32_t column) {
    const float value = usable_logit(x);
    const uint64_t rank = rank_key(order_key(value), column);
    if (rank != best) sum += vs::exp2_fast((value - base) * kLog2E);
    if (rank >= threshold) {
      const uint32_t place = vs::atomic_add(listed, 1u);
      if (place < kGrowList) list[place] = rank;
    }
  });
  vs::sync_block();
  uint32_t count = *listed;
  if (count > kGrowList) {
    // Too many columns above the threshold (they came to few groups): K passes, each below the last one's
    // find.
    uint64_t below = ~uint64_t{0};
    for (uint32_t k = 0; k < K; ++k) {
      uint64_t next = 0;
      for_each_column(row, 0, V, [&](float x, uint32_t column) {
        const uint64_t rank = rank_key(order_key(usable_logit(x)), column);
        if (rank < below && rank > next) next = rank;
      });
      below = block_max(next, scratch);
      if (thread == 0) list[k] = below;
    }
    count = K;
    vs::sync_block();
  }

  // Doubles from here on. The best column's 1 was left out: beside it a float would lose all below 6e-8, and
  // two rows that are nearly sure of their token would tie.
  const double others = block_sum(static_cast<double>(sum), reinterpret_cast<double*>(scratch));
  const float log_sum = static_cast<float>(log(1.0 + others));
  const float parent_score = p.frontier_scores[b * p.R + r];
  const int64_t parent = p.frontier[b * p.R + r];
  if (thread < count) {
    const uint64_t rank = list[thread];
    uint32_t better = 0;
    for (uint32_t i = 0; i < count; ++i) better += list[i] > rank;
    if (better < K) {
      const uint32_t column = rank_index(rank);
      const float value = key_value(static_cast<uint32_t>(rank >> 32));
      const int64_t out = b * p.N + p.offset + r * p.K + better;
      p.candidate_tokens[out] =
          p.head_tokens == nullptr ? static_cast<int64_t>(column) : p.head_tokens[column];
      p.candidate_scores[out] = usable_score(parent_score + ((value - base) - log_sum));
      p.candidate_parents[out] = parent;
    }
  }
}

// One block a batch row: rank all R*K children by counting how many precede each.
VS_KERNEL void VS_BOUNDS(kGrowThreads, 1) grow_select(GrowLevel p) {
  const uint32_t K = static_cast<uint32_t>(p.K), children = static_cast<uint32_t>(p.R * p.K);
  vs::Shared shared;
  uint64_t* ranks = shared.array<uint64_t>(children);
  const int64_t b = vs::block_index().x;
  const int64_t first = b * p.N + p.offset;
  const uint32_t thread = vs::thread_index(), threads = vs::thread_count();
  for (uint32_t i = thread; i < children; i += threads) {
    ranks[i] = rank_key(order_key(p.candidate_scores[first + i]), i);
  }
  vs::sync_block();
  for (uint32_t i = thread; i < children; i += threads) {
    const uint64_t rank = ranks[i];
    uint32_t better = 0;
    for (uint32_t j = 0; j < children; ++j) better += ranks[j] > rank;
    if (better < K) {
      const int64_t out = b * p.K + better;
      p.next_frontier[out] = p.offset + i;
      p.next_rows[out] = i / K;
      p.next_tokens[out] = p.candidate_tokens[first + i];
      p.next_scores[out] = p.candidate_scores[first + i];
    }
  }
}

}  // namespace vispec::kernels
