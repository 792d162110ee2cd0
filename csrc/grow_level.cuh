// Kernel bodies of grow_level: blocks find the best K columns of chunks of rows, a second kernel merges them
// and chooses the best K children.
//
//   scan    (chunks, R, B)  best K and sum of exponentials of one chunk of a row
//   select  (B)             every row's best K and its log-sum from its chunks, then the best K children
//
// A chunk's size depends on V alone, and chunks are merged in one order: a row's scores are the same bit for
// bit in every batch. No exponential is taken before a chunk's maximum is known, so none is wasted; the
// second pass over a chunk (16 KiB of bf16) finds it in the first-level cache.
#pragma once

#include "logits.cuh"
#include "ops.h"

namespace vispec::kernels {

constexpr uint32_t kGrowThreads = 512;
constexpr uint32_t kGrowGroups = 128;  // of 4 threads; at least K of them, and few enough to rank by counting
constexpr uint32_t kSelectThreads = 1024;
constexpr uint32_t kSelectKeys = 2048;  // that the merge holds in shared memory, if one row has no more
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

inline size_t grow_scan_shared_bytes(int64_t V, int64_t K) {
  return vs::shared_bytes<uint64_t>(kGrowGroups) + vs::shared_bytes<uint64_t>(grow_list(V, K)) +
         vs::shared_bytes<uint64_t>(kGrowThreads / vs::kWarpSize) + vs::shared_bytes<uint32_t>(1);
}

// Rows whose chunks the merge takes at once.
inline uint32_t grow_rows_at_once(int64_t R, int64_t V, int64_t K) {
  const int64_t fitting = kSelectKeys / (grow_chunks(V) * K);
  return static_cast<uint32_t>(fitting < 1 ? 1 : fitting < R ? fitting : R);
}

inline size_t grow_select_shared_bytes(int64_t R, int64_t V, int64_t K) {
  const int64_t rows = grow_rows_at_once(R, V, K);
  return vs::shared_bytes<uint64_t>(static_cast<size_t>(R * K)) +
         vs::shared_bytes<uint64_t>(static_cast<size_t>(rows * grow_chunks(V) * K)) +
         2 * vs::shared_bytes<float>(static_cast<size_t>(rows));
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

template <typename T>
VS_KERNEL void VS_BOUNDS(kGrowThreads, 2)
    grow_scan(GrowLevel p, GrowWorkspace work, uint32_t columns, uint32_t most) {
  vs::Shared shared;
  uint64_t* groups = shared.array<uint64_t>(kGrowGroups);
  uint64_t* list = shared.array<uint64_t>(most);
  uint64_t* scratch = shared.array<uint64_t>(kGrowThreads / vs::kWarpSize);
  uint32_t* listed = shared.array<uint32_t>(1);

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

// Called by one whole warp, a lane a chunk: the base and the log-sum of a row. Doubles, and the best column's
// 1 added last: beside it a float would lose all below 6e-8, and two rows that are nearly sure of their token
// would tie.
VS_DEVICE void merge_sums(const uint64_t* ranks, const double* sums, uint32_t chunks, uint32_t K, float* base,
                          float* log_sum) {
  const uint32_t lane = vs::lane_index();
  const uint64_t own = lane < chunks ? ranks[lane * K] : 0;
  const uint64_t best = vs::warp_max(own);
  const float row_base = rank_base(best);
  double others = 0.0;
  if (lane < chunks) {
    others = sums[lane] * exp(static_cast<double>(rank_base(own)) - static_cast<double>(row_base));
    if (own != best) {
      const float value = key_value(static_cast<uint32_t>(own >> 32));
      others += exp(static_cast<double>(value) - static_cast<double>(row_base));
    }
  }
  others = vs::warp_sum(others);
  if (lane == 0) {
    *base = row_base;
    *log_sum = static_cast<float>(log(1.0 + others));
  }
}

// How many of a row's entries precede one; those that are not among the best K may stop at K. Lists descend,
// so that no more than chunks + K comparisons are needed.
VS_DEVICE uint32_t count_better(const uint64_t* ranks, uint32_t chunks, uint32_t K, uint64_t rank) {
  uint32_t better = 0;
  for (uint32_t c = 0; c < chunks && better < K; ++c) {
    for (uint32_t k = 0; k < K && better < K && ranks[c * K + k] > rank; ++k) ++better;
  }
  return better;
}

// One block a batch row: a few frontier rows at a time become children; then all R*K children are ranked by
// counting how many precede each.
VS_KERNEL void VS_BOUNDS(kSelectThreads, 1)
    grow_select(GrowLevel p, GrowWorkspace work, uint32_t chunks, uint32_t rows_at_once) {
  const uint32_t K = static_cast<uint32_t>(p.K), R = static_cast<uint32_t>(p.R), children = R * K;
  const uint32_t a_row = chunks * K;
  vs::Shared shared;
  uint64_t* ranks = shared.array<uint64_t>(children);
  uint64_t* entries = shared.array<uint64_t>(rows_at_once * a_row);
  float* bases = shared.array<float>(rows_at_once);
  float* log_sums = shared.array<float>(rows_at_once);
  const int64_t b = vs::block_index().x;
  const int64_t first = b * p.N + p.offset;
  const uint32_t thread = vs::thread_index(), threads = vs::thread_count();
  for (uint32_t done = 0; done < R; done += rows_at_once) {
    const uint32_t rows = R - done < rows_at_once ? R - done : rows_at_once;
    const int64_t start = (b * p.R + done) * chunks;
    for (uint32_t i = thread; i < rows * a_row; i += threads) entries[i] = work.ranks[start * p.K + i];
    vs::sync_block();
    for (uint32_t r = vs::warp_index(); r < rows; r += vs::warp_count()) {
      merge_sums(entries + r * a_row, work.sums + start + r * chunks, chunks, K, bases + r, log_sums + r);
    }
    vs::sync_block();
    for (uint32_t i = thread; i < rows * a_row; i += threads) {
      const uint64_t rank = entries[i];
      const uint32_t r = i / a_row;
      const uint32_t better = rank == 0 ? K : count_better(entries + r * a_row, chunks, K, rank);
      if (better >= K) continue;
      const uint32_t column = rank_index(rank), child = (done + r) * K + better;
      const float value = key_value(static_cast<uint32_t>(rank >> 32));
      const float parent_score = p.frontier_scores[b * p.R + done + r];
      const float score = usable_score(parent_score + ((value - bases[r]) - log_sums[r]));
      p.candidate_tokens[first + child] =
          p.head_tokens == nullptr ? static_cast<int64_t>(column) : p.head_tokens[column];
      p.candidate_scores[first + child] = score;
      p.candidate_parents[first + child] = p.frontier[b * p.R + done + r];
      ranks[child] = rank_key(order_key(score), child);
    }
    vs::sync_block();  // the next rows' entries overwrite these
  }
  for (uint32_t i = thread; i < children; i += threads) {
    const uint64_t rank = ranks[i];
    uint32_t better = 0;
    for (uint32_t j = 0; j < children; ++j) better += ranks[j] > rank;
    if (better < K) {
      const int64_t out = b * p.K + better;
      p.next_frontier[out] = p.offset + i;
      p.next_rows[out] = i / K;
      p.next_tokens[out] = p.candidate_tokens[first + i];
      p.next_scores[out] = key_value(static_cast<uint32_t>(rank >> 32));
    }
  }
}

}  // namespace vispec::kernels
