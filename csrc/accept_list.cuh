// The likely tokens of each row, listed by all the blocks that share it, so that one block can then cut the
// row without reading it.
//
// Every warp of the scan leaves its best logit. What `wanted` of a row's warps reach is a limit that at least
// as many tokens reach, and seldom more than twice as many: for top-k with wanted = k the k best tokens and
// all tied with the k-th are among them. For top-p alone the list is as long as is quickly sorted, and
// because the mass below it counts too, the same blocks weigh the whole row. A short row is listed whole.
#pragma once

#include "accept.cuh"

namespace vispec::kernels {

constexpr uint32_t kMassTokens = 192;  // wanted for top-p alone; lists then have about 300

// Called by one whole warp: the highest key, cut to its upper half (all of a bfloat16), that at least
// `wanted` of the groups reach; 0 if there is none. The same in every lane.
VS_DEVICE uint32_t reached_by(const uint32_t* groups, uint32_t count, uint32_t wanted) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 16; --bit) {
    const uint32_t tried = found | uint32_t{1} << bit;
    uint32_t reached = 0;
    for (uint32_t g = vs::lane_index(); g - vs::lane_index() < count; g += vs::kWarpSize) {
      reached += static_cast<uint32_t>(vs::count_bits(vs::ballot(g < count && groups[g] >= tried)));
    }
    if (reached >= wanted) found = tried;
  }
  return found;
}

// Tokens whose score is `score` at least are listed; they all have logits of `logit` at least. Hence every
// token that is listed has a higher score than every one that is not. Not known: nothing is listed.
struct ListLimit {
  float logit, score;
  bool known;
};
VS_DEVICE ListLimit list_limit(const Accept& p, int64_t b, uint32_t reached) {
  const float limit = key_value(reached), temperature = p.temperature[b];
  const float score = vs::divide(limit, temperature), logit = logit_below(limit, score, temperature);
  if (logit > -vs::infinity()) return {logit, score, true};
  return {-vs::infinity(), -vs::infinity(), p.V <= kShortList};
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kScanThreads, 5) accept_list(Accept p, AcceptWorkspace work) {
  const uint32_t chunks = vs::grid_size().x, count = chunks * kScanWarps;
  vs::Shared shared;
  uint32_t* groups = shared.array<uint32_t>(count);
  uint64_t* keys = shared.array<uint64_t>(kShortList);
  uint64_t* scratch = shared.array<uint64_t>(kScanWarps);
  uint64_t* rank = shared.array<uint64_t>(1);
  uint32_t* words = shared.array<uint32_t>(3);  // limit, listed, place
  const int64_t chunk = vs::block_index().x, t = vs::block_index().y, b = vs::block_index().z;
  const Cuts cuts = row_cuts(p, b);
  if (!emits(p, b) || !(cuts.by_count || cuts.by_mass)) return;
  const int64_t row = b * p.T + t;
  const uint32_t thread = vs::thread_index();
  for (uint32_t i = thread; i < count; i += kScanThreads) groups[i] = work.groups[row * count + i];
  if (thread == 0) words[1] = 0;
  vs::sync_block();
  if (vs::warp_index() == 0) {
    const uint64_t found = row_best(work.best + row * chunks, chunks);
    const uint32_t most = cuts.by_count ? count : count / 4 * 3;
    const int64_t wanted = cuts.by_count ? p.top_k[b] : most < kMassTokens ? most : kMassTokens;
    const uint32_t limit =
        wanted > count || p.V <= kShortList ? 0 : reached_by(groups, count, static_cast<uint32_t>(wanted));
    if (thread == 0) {
      *rank = found;
      words[0] = limit;
    }
  }
  vs::sync_block();
  const Best best = best_score(*rank, p.temperature[b]);
  if (!best.usable) return;
  const ListLimit limit = list_limit(p, b, words[0]);
  const bool weighs = !cuts.by_count;
  uint64_t sum = 0;
  if (limit.known) {
    const uint32_t begin = static_cast<uint32_t>(chunk) * kAcceptChunk, V = static_cast<uint32_t>(p.V);
    const uint32_t end = V - begin < kAcceptChunk ? V : begin + kAcceptChunk;
    for_each_column(accept_row<T>(p, b, t), begin, end, [&](float x, uint32_t column) {
      if (!weighs && x < limit.logit) return;
      const float score = vs::divide(x, p.temperature[b]);
      if (weighs) sum += static_cast<uint64_t>(token_weight(score - best.score));
      if (x < limit.logit || score < limit.score) return;
      const uint32_t place = vs::atomic_add(&words[1], uint32_t{1});
      if (place < kShortList) keys[place] = filter_key(order_key(score), column);
    });
  } else if (thread == 0) {
    words[1] = kShortList + 1;
  }
  sum = block_sum(sum, scratch);
  const uint32_t listed = words[1];
  if (thread == 0) {
    work.sums[row * chunks + chunk] = sum;
    words[2] = static_cast<uint32_t>(vs::atomic_add(&work.listed[row], uint64_t{listed}));
  }
  vs::sync_block();
  for (uint32_t i = thread; i < listed; i += kScanThreads) {
    if (words[2] + i < kShortList) work.list[row * kShortList + words[2] + i] = keys[i];
  }
}

}  // namespace vispec::kernels
