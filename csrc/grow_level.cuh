// Kernel of grow_level, one launch: a block a chunk of a frontier row scans it, and the block of a batch row
// that is done last goes on alone, from the chunks' best to all that the next level reads.
//
// Chunks are merged in one order, whichever block does it: the same bits every time. What a block leaves for
// the last one goes through the workspace; nobody waits.
#pragma once

#include "grow_scan.cuh"

namespace vispec::kernels {

constexpr uint32_t kMergeKeys = 2048;  // that the merge holds in shared memory, if one row has no more
constexpr uint32_t kGatherBatch = 4;   // words in flight in a thread

// Rows whose chunks the merge takes at once.
inline uint32_t grow_rows_at_once(int64_t R, int64_t V, int64_t K) {
  const int64_t fitting = kMergeKeys / (grow_chunks(V) * K);
  return static_cast<uint32_t>(fitting < 1 ? 1 : fitting < R ? fitting : R);
}

struct GrowSizes {
  uint32_t columns, chunks, rows_at_once;
  uint32_t
      keys;  // in shared memory: the scan's list first, later the children and the entries merged at once
};

inline GrowSizes grow_sizes(const GrowLevel& p) {
  const uint32_t chunks = grow_chunks(p.V), rows_at_once = grow_rows_at_once(p.R, p.V, p.K);
  const size_t list = grow_list(p.V, p.K), merged = static_cast<size_t>((p.R + rows_at_once * chunks) * p.K);
  return {grow_chunk(p.V), chunks, rows_at_once, static_cast<uint32_t>(list > merged ? list : merged)};
}

inline size_t grow_shared_bytes(const GrowSizes& sizes, int64_t K) {
  return vs::shared_bytes<uint64_t>(kGrowGroups) + vs::shared_bytes<uint64_t>(sizes.keys) +
         vs::shared_bytes<uint64_t>(kGrowThreads / vs::kWarpSize) + 2 * vs::shared_bytes<uint32_t>(1) +
         2 * vs::shared_bytes<float>(sizes.rows_at_once) + vs::shared_bytes<uint32_t>(static_cast<size_t>(K));
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

// Turns the entries of `rows` frontier rows from `done` on into children: candidates, and their rank keys.
VS_DEVICE void score_children(const GrowLevel& p, uint32_t done, uint32_t rows, uint32_t chunks,
                              const uint64_t* entries, const float* bases, const float* log_sums,
                              uint64_t* ranks) {
  const uint32_t K = static_cast<uint32_t>(p.K), a_row = chunks * K;
  const int64_t b = vs::block_index().z, first = b * p.N + p.offset;
  for (uint32_t i = vs::thread_index(); i < rows * a_row; i += vs::thread_count()) {
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
}

// The best K of all children, ranked by counting how many precede each; `rows` gets the row of each.
VS_DEVICE void choose_frontier(const GrowLevel& p, const uint64_t* ranks, uint32_t* rows) {
  const uint32_t K = static_cast<uint32_t>(p.K), children = static_cast<uint32_t>(p.R) * K;
  const int64_t b = vs::block_index().z, first = b * p.N + p.offset;
  for (uint32_t i = vs::thread_index(); i < children; i += vs::thread_count()) {
    const uint64_t rank = ranks[i];
    uint32_t better = 0;
    for (uint32_t j = 0; j < children; ++j) better += ranks[j] > rank;
    if (better < K) {
      const int64_t out = b * p.K + better;
      rows[better] = i / K;
      p.next_frontier[out] = p.offset + i;
      p.next_rows[out] = i / K;
      p.next_tokens[out] = p.candidate_tokens[first + i];
      p.next_scores[out] = key_value(static_cast<uint32_t>(rank >> 32));
    }
  }
}

// Each node sees what its row sees, and its own slot.
VS_DEVICE void write_ancestors(const GrowLevel& p, const uint32_t* rows) {
  const uint32_t K = static_cast<uint32_t>(p.K), slots = static_cast<uint32_t>(p.slots);
  const uint32_t before = (slots + 63) / 64, words = (slots + K + 63) / 64;
  const int64_t b = vs::block_index().z;
  for (uint32_t i = vs::thread_index(); i < K * words; i += vs::thread_count()) {
    const uint32_t k = i / words, w = i % words, own = slots + k;
    uint64_t word = own / 64 == w ? uint64_t{1} << own % 64 : 0;
    if (w < before) word |= static_cast<uint64_t>(p.ancestors[(b * p.R + rows[k]) * before + w]);
    p.next_ancestors[b * p.K * words + i] = static_cast<int64_t>(word);
  }
}

template <typename Word>
VS_DEVICE void gather_words(const GrowLevel& p, const uint32_t* rows) {
  const uint32_t words = static_cast<uint32_t>(p.C * p.hidden_bytes / static_cast<int64_t>(sizeof(Word)));
  const uint32_t total = static_cast<uint32_t>(p.K) * words, threads = vs::thread_count();
  const int64_t b = vs::block_index().z;
  const unsigned char* source =
      static_cast<const unsigned char*>(p.hidden) + b * p.hidden_batch_stride * p.hidden_bytes;
  Word* target = static_cast<Word*>(p.next_hidden) + b * total;
  for (uint32_t first = vs::thread_index(); first < total; first += threads * kGatherBatch) {
    Word batch[kGatherBatch];
    VS_UNROLL
    for (uint32_t j = 0; j < kGatherBatch; ++j) {
      const uint32_t i = first + j * threads;
      if (i < total) {
        batch[j] = vs::load<Word>(source + rows[i / words] * p.hidden_row_stride * p.hidden_bytes +
                                  i % words * sizeof(Word));
      }
    }
    VS_UNROLL
    for (uint32_t j = 0; j < kGatherBatch; ++j) {
      if (first + j * threads < total) vs::store<Word>(target + first + j * threads, batch[j]);
    }
  }
}

VS_DEVICE void gather_hidden(const GrowLevel& p, const uint32_t* rows) {
  const uintptr_t together = reinterpret_cast<uintptr_t>(p.hidden) |
                             reinterpret_cast<uintptr_t>(p.next_hidden) |
                             static_cast<uintptr_t>(p.hidden_batch_stride * p.hidden_bytes) |
                             static_cast<uintptr_t>(p.hidden_row_stride * p.hidden_bytes) |
                             static_cast<uintptr_t>(p.C * p.hidden_bytes);
  vs::with_widest_word(together, [&](auto word) { gather_words<decltype(word)>(p, rows); });
}

// The rest of a batch row's level, by one block, from what all its blocks left in the workspace: a few
// frontier rows at a time become children, the best of them the next frontier.
VS_DEVICE void finish_level(const GrowLevel& p, const GrowWorkspace& work, const GrowSizes& sizes,
                            uint64_t* ranks, uint64_t* entries, float* bases, float* log_sums,
                            uint32_t* rows) {
  const uint32_t K = static_cast<uint32_t>(p.K), R = static_cast<uint32_t>(p.R);
  const uint32_t chunks = sizes.chunks, a_row = chunks * K;
  for (uint32_t done = 0; done < R; done += sizes.rows_at_once) {
    const uint32_t taken = R - done < sizes.rows_at_once ? R - done : sizes.rows_at_once;
    const int64_t start = (vs::block_index().z * p.R + done) * chunks;
    for (uint32_t i = vs::thread_index(); i < taken * a_row; i += vs::thread_count()) {
      entries[i] = work.ranks[start * p.K + i];
    }
    vs::sync_block();
    for (uint32_t r = vs::warp_index(); r < taken; r += vs::warp_count()) {
      merge_sums(entries + r * a_row, work.sums + start + r * chunks, chunks, K, bases + r, log_sums + r);
    }
    vs::sync_block();
    score_children(p, done, taken, chunks, entries, bases, log_sums, ranks);
    vs::sync_block();  // the next rows' entries overwrite these
  }
  choose_frontier(p, ranks, rows);
  vs::sync_block();
  if (p.next_ancestors != nullptr) write_ancestors(p, rows);
  if (p.next_hidden != nullptr) gather_hidden(p, rows);
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kGrowThreads, 2)
    grow_level_blocks(GrowLevel p, GrowWorkspace work, GrowSizes sizes) {
  vs::Shared shared;
  uint64_t* groups = shared.array<uint64_t>(kGrowGroups);
  uint64_t* keys = shared.array<uint64_t>(sizes.keys);
  uint64_t* scratch = shared.array<uint64_t>(kGrowThreads / vs::kWarpSize);
  uint32_t* listed = shared.array<uint32_t>(1);
  uint32_t* last = shared.array<uint32_t>(1);
  float* bases = shared.array<float>(sizes.rows_at_once);
  float* log_sums = shared.array<float>(sizes.rows_at_once);
  uint32_t* rows = shared.array<uint32_t>(static_cast<size_t>(p.K));

  scan_chunk<T>(p, work, sizes.columns, groups, keys, scratch, listed);
  vs::sync_block();
  if (vs::thread_index() == 0) {
    uint32_t* arrivals = p.arrivals + vs::block_index().z;
    const uint32_t blocks = sizes.chunks * static_cast<uint32_t>(p.R);
    *last = vs::arrive_last(arrivals, blocks) ? 1 : 0;
  }
  vs::sync_block();
  if (*last == 0) return;
  finish_level(p, work, sizes, keys, keys + p.R * p.K, bases, log_sums, rows);
}

}  // namespace vispec::kernels
