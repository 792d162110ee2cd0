// The first half of grow_level's kernel: a block finds the best K columns of one chunk of a row.
//
// A chunk's size depends on V alone: a row's chunks are the same in every batch. No exponential is taken
// before a chunk's maximum is known, so none is wasted; the second pass over a chunk (16 KiB of bf16) finds
// it in the first-level cache.
#pragma once

#include "logits.cuh"
#include "ops.h"

namespace vispec::kernels {

constexpr uint32_t kGrowThreads = 512;
constexpr uint32_t kGrowGroups = 128;  // of 4 threads; at least K of them, and few enough to rank by counting
constexpr float kLargest = 3.402823466e38f;

// 8 rows of V = 152k are 152 blocks, all on 132 SMs at once. The merge gives each lane of a warp a chunk:
// 32 at most.
inline uint32_t grow_chunk(int64_t V) { return V <= 32 * 8192 ? 8192 : 16384; }
inline uint32_t grow_chunks(int64_t V) {
  return static_cast<uint32_t>((V + grow_chunk(V) - 1) / grow_chunk(V));
}

// Columns at or above the threshold lie in K groups; a thread reads whole vectors and two columns beside
// them.
inline size_t grow_list(int64_t V, int64_t K) {
  return static_cast<size_t>(K) * (kGrowThreads / kGrowGroups) * (grow_chunk(V) / kGrowThreads + 2);
}

// What the scan leaves of each chunk.
struct GrowWorkspace {
  uint64_t* ranks;  // [B, R, chunks, K] rank keys, descending; 0 where the chunk has fewer columns
  double* sums;     // [B, R, chunks] of exp(logit - best) of all columns but the best
};

inline GrowWorkspace grow_workspace(const GrowLevel& p) {
  const int64_t chunks = p.B * p.R * grow_chunks(p.V);
  uint64_t* start = static_cast<uint64_t*>(p.workspace);
  return {start, reinterpret_cast<double*>(start + chunks * p.K)};
}

// NaN counts as -inf, +inf as the largest float.
VS_DEVICE float usable_logit(float x) {
  if (vs::is_nan(x)) return -vs::infinity();
  return x > kLargest ? kLargest : x;
}

VS_DEVICE float usable_score(float x) { return vs::is_nan(x) ? -vs::infinity() : x; }

// What exponentials are taken of differences to: the best logit, finite where that is -inf.
VS_DEVICE float rank_base(uint64_t best) {
  const float top = key_value(static_cast<uint32_t>(best >> 32));
  return top < -kLargest ? -kLargest : top;
}

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

// `groups`, `list` and `scratch` lie in shared memory, with room for kGrowGroups, grow_list(V, K) and a
// number a warp. Leaves the chunk's best and its sum in the workspace.
template <typename T>
VS_DEVICE void scan_chunk(const GrowLevel& p, const GrowWorkspace& work, uint32_t columns, uint64_t* groups,
                          uint64_t* list, uint64_t* scratch, uint32_t* listed) {
  const int64_t chunk = vs::block_index().x, r = vs::block_index().y, b = vs::block_index().z;
  const uint32_t thread = vs::thread_index(), K = static_cast<uint32_t>(p.K), V = static_cast<uint32_t>(p.V);
  const uint32_t begin = static_cast<uint32_t>(chunk) * columns;
  const uint32_t end = V - begin < columns ? V : begin + columns;
  const T* row = static_cast<const T*>(p.logits) + b * p.logits_batch_stride + r * p.logits_row_stride;

  uint64_t seen = 0;
  for_each_column(row, begin, end, [&](float x, uint32_t column) {
    const uint64_t rank = rank_key(order_key(usable_logit(x)), column);
    seen = rank > seen ? rank : seen;
  });
  const uint64_t best = block_max(seen, scratch);
  const float base = rank_base(best);
  const uint64_t threshold = grow_threshold(seen, K, groups, scratch);

  if (thread == 0) *listed = 0;
  vs::sync_block();
  float sum = 0.0f;
  for_each_column(row, begin, end, [&](float x, uint32_t column) {
    const float value = usable_logit(x);
    const uint64_t rank = rank_key(order_key(value), column);
    if (rank != best) sum += vs::exp2_fast((value - base) * kLog2E);
    if (rank >= threshold) list[vs::atomic_add(listed, 1u)] = rank;
  });
  const double others = block_sum(static_cast<double>(sum), reinterpret_cast<double*>(scratch));

  const uint32_t count = *listed;
  const int64_t place = (b * p.R + r) * vs::grid_size().x + chunk;
  uint64_t* ranks = work.ranks + place * p.K;
  for (uint32_t i = thread; i < count; i += kGrowThreads) {
    uint32_t better = 0;
    for (uint32_t j = 0; j < count; ++j) better += list[j] > list[i];
    if (better < K) ranks[better] = list[i];
  }
  if (thread >= count && thread < K) ranks[thread] = 0;
  if (thread == 0) work.sums[place] = others;
}

}  // namespace vispec::kernels
