// Kernel bodies of accept: all T rows are examined in parallel, a short walk then follows the tree.
//
//   scan     (chunks, T, B)  best rank key of each chunk; a NaN or +inf shows in it
//   list     (chunks, T, B)  sampling: the likely tokens of a row with top-k or top-p
//   filter   (T, B)          sampling: the filter key at which top-k and top-p cut; nothing to do without
//   them weigh    (chunks, T, B)  sampling: the sum of the kept weights of each chunk choose   (T, B)
//   sampling: the draw, chunk first, then the token inside it walk     (B)             down the tree
//
// Weights are the integers of sampling.h, so sums need no order and every backend draws the same token. No
// weight is stored: taking it again costs less than 8 V bytes of traffic a row.
#pragma once

#include "logits.cuh"
#include "ops.h"
#include "sampling.h"

namespace vispec::kernels {

constexpr uint32_t kAcceptChunk =
    4096;  // 38 chunks for V = 152k: 1140 blocks for T = 30, one wave on 132 SMs
constexpr uint32_t kScanThreads = 256;
constexpr uint32_t kScanWarps = kScanThreads / vs::kWarpSize;
constexpr uint32_t kShortList = 512;  // tokens of a row that are listed, one for each thread of the filter
constexpr uint32_t kChooseThreads = 256;
constexpr uint32_t kWalkThreads = 256;

// Among equal scores top-p removes lower indices first: its order is (score, index), both ascending.
VS_DEVICE uint64_t filter_key(uint32_t key, uint32_t index) { return uint64_t{key} << 32 | index; }

// The workspace, as arrays over [B, T, chunks] and [B, T].
struct AcceptWorkspace {
  uint64_t* best;    // rank key on the raw logits
  uint64_t* sums;    // of kept weights
  uint64_t* cuts;    // filter key of the first token kept
  int64_t* choices;  // token, or -1 where the row is unusable
  uint64_t* listed;  // tokens that belong on the list, which may be more than fit
  uint64_t* list;    // [B, T, kShortList] filter keys, in no order
  uint32_t* groups;  // [B, T, chunks, kScanWarps] order key of each warp's best logit, 0 without any
};

inline int64_t accept_chunks(int64_t V) { return (V + kAcceptChunk - 1) / kAcceptChunk; }

inline AcceptWorkspace accept_workspace(const Accept& p) {
  const int64_t rows = p.B * p.T, partials = rows * accept_chunks(p.V);
  uint64_t* start = static_cast<uint64_t*>(p.workspace);
  uint64_t* after = start + 2 * partials;
  return {start,
          start + partials,
          after,
          reinterpret_cast<int64_t*>(after + rows),
          after + 2 * rows,
          after + 3 * rows,
          reinterpret_cast<uint32_t*>(after + (3 + kShortList) * rows)};
}

inline int64_t accept_workspace_words(int64_t B, int64_t T, int64_t V) {
  return B * T * (accept_chunks(V) * (2 + kScanWarps / 2) + 3 + kShortList);
}

template <typename T>
VS_DEVICE const T* accept_row(const Accept& p, int64_t b, int64_t t) {
  return static_cast<const T*>(p.logits) + b * p.logits_batch_stride + t * p.logits_row_stride;
}

VS_DEVICE bool emits(const Accept& p, int64_t b) { return p.finished[b] == 0 && p.remaining[b] > 0; }

// The best score of a row after temperature (monotone, so the best logit's); whether the row can be used at
// all, which it cannot be with a temperature that is no positive number either.
struct Best {
  float score;
  bool usable;
};
VS_DEVICE Best best_score(uint64_t rank, float temperature) {
  const uint32_t key = static_cast<uint32_t>(rank >> 32);
  const float score = vs::divide(key_value(key), temperature);
  return {score, score < vs::infinity() && score > -vs::infinity() && temperature > 0.0f &&
                     temperature < vs::infinity()};
}

// Called by one whole warp: the best of the row's chunks, in every lane.
VS_DEVICE uint64_t row_best(const uint64_t* best, uint32_t chunks) {
  uint64_t rank = 0;
  for (uint32_t c = vs::lane_index(); c < chunks; c += vs::kWarpSize) rank = best[c] > rank ? best[c] : rank;
  return vs::warp_max(rank);
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kScanThreads, 6) accept_scan(Accept p, AcceptWorkspace work) {
  vs::Shared shared;
  uint64_t* scratch = shared.array<uint64_t>(kScanThreads / vs::kWarpSize);
  const int64_t chunk = vs::block_index().x, t = vs::block_index().y, b = vs::block_index().z;
  if (!emits(p, b)) return;
  const uint32_t begin = static_cast<uint32_t>(chunk) * kAcceptChunk, V = static_cast<uint32_t>(p.V);
  const uint32_t end = V - begin < kAcceptChunk ? V : begin + kAcceptChunk;
  uint64_t seen = 0;
  for_each_column(accept_row<T>(p, b, t), begin, end, [&](float x, uint32_t column) {
    // NaN as +inf: either one makes the row unusable.
    const uint64_t rank = rank_key(order_key(vs::is_nan(x) ? vs::infinity() : x), column);
    seen = rank > seen ? rank : seen;
  });
  const int64_t place = (b * p.T + t) * vs::grid_size().x + chunk;
  if (p.do_sample != 0) {
    const uint64_t group = vs::warp_max(seen);
    if (vs::lane_index() == 0) {
      work.groups[place * kScanWarps + vs::warp_index()] = static_cast<uint32_t>(group >> 32);
    }
  }
  seen = block_max(seen, scratch);
  if (vs::thread_index() == 0) {
    work.best[place] = seen;
    if (chunk == 0 && p.do_sample != 0) work.listed[b * p.T + t] = 0;
  }
}

// Which cuts a row asks for.
struct Cuts {
  bool by_count, by_mass;
};
VS_DEVICE Cuts row_cuts(const Accept& p, int64_t b) {
  return {p.top_k[b] > 0 && p.top_k[b] < p.V, p.top_p[b] < 1.0f};
}

// A little below `logit`: lower logits have lower scores than `score`, and need no division to show it. -inf
// where that cannot be told.
VS_DEVICE float logit_below(float logit, float score, float temperature) {
  const float lower = logit - ((logit < 0.0f ? -logit : logit) * 0x1p-20f + 0x1p-60f);
  return vs::divide(lower, temperature) < score ? lower : -vs::infinity();
}

// What a token adds to the draw: 0 below the cut or below min-p.
struct Keep {
  float temperature, best;
  float lowest;  // logits below it are cut
  double least;  // min-p as a weight
  uint64_t cut;
};
VS_DEVICE uint64_t kept_weight(float logit, uint32_t column, const Keep& keep) {
  if (logit < keep.lowest) return 0;
  const float score = vs::divide(logit, keep.temperature);
  const uint64_t weight = static_cast<uint64_t>(token_weight(score - keep.best));
  const bool kept =
      filter_key(order_key(score), column) >= keep.cut && static_cast<double>(weight) >= keep.least;
  return kept ? weight : 0;
}

VS_DEVICE Keep row_keep(const Accept& p, int64_t b, float best, uint64_t cut) {
  const float temperature = p.temperature[b], score = key_value(static_cast<uint32_t>(cut >> 32));
  const float min_p = p.min_p[b] < 1.0f ? p.min_p[b] : 1.0f;  // the best token stays, whatever is asked for
  return {temperature, best, logit_below(score * temperature, score, temperature),
          static_cast<double>(min_p) * (uint64_t{1} << kWeightBits), cut};
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kScanThreads, 6) accept_weigh(Accept p, AcceptWorkspace work) {
  vs::Shared shared;
  uint64_t* scratch = shared.array<uint64_t>(kScanThreads / vs::kWarpSize);
  uint64_t* found = shared.array<uint64_t>(1);
  const int64_t chunk = vs::block_index().x, t = vs::block_index().y, b = vs::block_index().z;
  if (!emits(p, b)) return;
  const int64_t row = b * p.T + t, chunks = vs::grid_size().x;
  if (vs::warp_index() == 0) {
    const uint64_t rank = row_best(work.best + row * chunks, static_cast<uint32_t>(chunks));
    if (vs::lane_index() == 0) *found = rank;
  }
  vs::sync_block();
  const Best best = best_score(*found, p.temperature[b]);
  if (!best.usable) return;
  const Keep keep = row_keep(p, b, best.score, work.cuts[row]);
  const uint32_t begin = static_cast<uint32_t>(chunk) * kAcceptChunk, V = static_cast<uint32_t>(p.V);
  const uint32_t end = V - begin < kAcceptChunk ? V : begin + kAcceptChunk;
  uint64_t sum = 0;
  for_each_column(accept_row<T>(p, b, t), begin, end,
                  [&](float x, uint32_t column) { sum += kept_weight(x, column, keep); });
  sum = block_sum(sum, scratch);
  if (vs::thread_index() == 0) work.sums[row * chunks + chunk] = sum;
}

// Ancestors of a node; a node follows its parent, and a stale parent ends the count.
VS_DEVICE int64_t node_depth(const int64_t* parents, int64_t node) {
  int64_t depth = 0;
  for (int64_t at = node; at > 0; ++depth) {
    const int64_t parent = parents[at];
    at = parent >= 0 && parent < at ? parent : 0;
  }
  return depth;
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kChooseThreads, 4) accept_choose(Accept p, AcceptWorkspace work, uint32_t chunks) {
  vs::Shared shared;
  uint64_t* shares = shared.array<uint64_t>(kChooseThreads);
  uint64_t* rank = shared.array<uint64_t>(1);
  uint64_t* target = shared.array<uint64_t>(1);
  uint32_t* place = shared.array<uint32_t>(2);  // chunk, thread
  const int64_t t = vs::block_index().x, b = vs::block_index().y;
  if (!emits(p, b)) return;
  const int64_t row = b * p.T + t;
  const uint32_t thread = vs::thread_index();
  const uint64_t* sums = work.sums + row * chunks;
  if (vs::warp_index() == 0) {
    const uint64_t found = row_best(work.best + row * chunks, chunks);
    if (thread == 0) *rank = found;
  }
  vs::sync_block();
  const Best best = best_score(*rank, p.temperature[b]);
  if (!best.usable) {
    if (thread == 0) work.choices[row] = -1;
    return;
  }
  if (vs::warp_index() == 0) {
    uint64_t total = 0;
    for (uint32_t c = thread; c < chunks; c += vs::kWarpSize) total += sums[c];
    total = vs::warp_sum(total);
    const double uniform = draw_uniform(p.seeds[b], p.lengths[b], node_depth(p.parents + b * p.T, t));
    // Rounding the sum to a double cannot bring the product up to the sum: uniform is at most 1 - 2^-48.
    const Crossing at =
        find_crossing(sums, chunks, static_cast<uint64_t>(uniform * static_cast<double>(total)));
    if (thread == 0) {
      *target = static_cast<uint64_t>(uniform * static_cast<double>(total)) - at.below;
      place[0] = at.bin;
    }
  }
  vs::sync_block();
  // Every thread sums an equal run of the chunk; then the one in which the target lies walks its run again.
  constexpr uint32_t kRun = kAcceptChunk / kChooseThreads;
  const Keep keep = row_keep(p, b, best.score, work.cuts[row]);
  const T* logits = accept_row<T>(p, b, t);
  const uint32_t V = static_cast<uint32_t>(p.V);
  const uint32_t begin = place[0] * kAcceptChunk + thread * kRun;
  uint64_t sum = 0;
  for (uint32_t i = 0; i < kRun; ++i) {
    if (begin + i < V) sum += kept_weight(vs::to_float(logits[begin + i]), begin + i, keep);
  }
  shares[thread] = sum;
  vs::sync_block();
  if (vs::warp_index() == 0) {
    const Crossing at = find_crossing(shares, kChooseThreads, *target);
    vs::sync_warp();
    if (thread == 0) {
      *target -= at.below;
      place[1] = at.bin;
    }
  }
  vs::sync_block();
  if (thread == place[1]) {
    uint64_t below = 0;
    uint32_t column = begin;
    for (uint32_t i = 0; i < kRun && begin + i < V; ++i) {
      below += kept_weight(vs::to_float(logits[begin + i]), begin + i, keep);
      column = begin + i;
      if (below > *target) break;
    }
    work.choices[row] = column;
  }
}

VS_KERNEL void VS_BOUNDS(kWalkThreads, 1) accept_walk(Accept p, AcceptWorkspace work, uint32_t chunks) {
  vs::Shared shared;
  int* child = shared.array<int>(kWalkThreads / vs::kWarpSize);
  int64_t* choice = shared.array<int64_t>(1);
  const int64_t b = vs::block_index().x;
  const uint32_t thread = vs::thread_index(), threads = vs::thread_count();
  const int64_t* tokens = p.tokens + b * p.T;
  const int64_t* parents = p.parents + b * p.T;
  int64_t* path = p.path + b * p.D;
  int64_t* emitted = p.emitted + b * p.D;
  const int64_t remaining = p.remaining[b];
  const int T = static_cast<int>(p.T);
  bool walking = emits(p, b), ended = false, failed = false;
  int64_t count = 0;
  int node = 0;
  // Every thread keeps the same copy of the walk's state, so all of them take the same way through the
  // barriers.
  while (walking && count < p.D) {
    if (vs::warp_index() == 0) {
      int64_t token;
      if (p.do_sample != 0) {
        token = work.choices[b * p.T + node];
      } else {
        const uint64_t rank = row_best(work.best + (b * p.T + node) * chunks, chunks);
        token = best_score(rank, 1.0f).usable ? static_cast<int64_t>(rank_index(rank)) : -1;
      }
      if (thread == 0) *choice = token;
    }
    vs::sync_block();
    const int64_t token = *choice;
    if (token < 0) {
      failed = true;
      break;
    }
    if (thread == 0) {
      path[count] = node;
      emitted[count] = token;
    }
    ++count;
    for (int64_t e = 0; e < p.E; ++e) ended = ended || p.end_tokens[e] == token;
    if (ended || count >= remaining) break;
    int next = T;
    for (int t = static_cast<int>(thread); t < T; t += static_cast<int>(threads)) {
      if (t > 0 && t < next && parents[t] == node && tokens[t] == token) next = t;
    }
    next = T - block_max(T - next, child);  // the lowest index
    walking = next < T;
    node = next;
  }
  if (failed) count = 0;
  vs::sync_block();  // the rows that thread 0 wrote are cleared by others where the walk failed
  for (int64_t j = count + thread; j < p.D; j += threads) path[j] = emitted[j] = -1;
  if (thread == 0) {
    p.counts[b] = count;
    p.status[b] = failed ? 1 : 0;
    if (!failed && (ended || count >= remaining)) p.finished[b] = 1;
  }
}

}  // namespace vispec::kernels
