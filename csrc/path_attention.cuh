// Kernels of path_attention: a row's result is a function of its query and of the keys and values along its
// path, in order of positions, and of nothing else: not of the slots in which its ancestors lie, of the other
// nodes, nor of how many keys the pass found committed.
//
// A node that sees n slots stands at position n - 1 of its path. Its keys fall into two parts, and where they
// part depends on n alone. Sealed tiles of 64 positions lie wholly below n - 48: no tree of 48 nodes reaches
// back so far, so that they hold committed slots, the same for all rows, and go through tensor cores. Runs of
// tiles begin at fixed positions. A row for which a tile is not sealed yet, though it is for another row,
// gives its keys weights of exactly 0: what the row has found so far stays as it is, bit by bit. The newest
// 48 to 111 keys are read by each row for itself, from the slots of its own path, and added one after the
// other.
#pragma once

#include "attention_merge.cuh"

namespace vispec::kernels {

constexpr int kPathNodes = 48;                     // of a tree, and so of a path in the tail
constexpr int kSealedTile = 64;                    // positions that are sealed together
constexpr int kPathRun = 256;                      // positions that one block adds up
constexpr int kNewest = kPathNodes + kSealedTile;  // more than any row has of its newest keys

// 64 rows by 64 keys, or by 32 where the head is so wide that no more fits: with four warps of 16 rows each,
// none of which shares a row's keys with another.
template <int kHead>
using PathShape = AttentionShape<kHead, 64, kHead == 256 ? 32 : 64>;
template <class Shape>
constexpr size_t kPathSharedBytes =
    vs::shared_bytes<uint16_t>(Shape::kRows * Shape::kPitch) + vs::shared_bytes<uint16_t>(4 * Shape::kTile);

// Positions below which a path of so many keys is sealed.
VS_DEVICE int64_t sealed_below(int64_t seen) {
  return seen < kPathNodes ? 0 : (seen - kPathNodes) / kSealedTile * kSealedTile;
}

// The nodes on one node's path as bits. Parents come before their children, so that ascending bits are the
// path in order.
VS_DEVICE uint64_t path_word(const TreeAttention& p, int64_t b, int64_t node, int64_t length) {
  const int64_t room = p.L - length, nodes = p.T < room ? p.T : room;
  return static_cast<uint64_t>(p.ancestors[b * p.T + node]) & ((uint64_t{1} << nodes) - 1);
}

VS_DEVICE int nodes_in(uint64_t word) {
  return vs::count_bits(static_cast<uint32_t>(word)) + vs::count_bits(static_cast<uint32_t>(word >> 32));
}

// Index of the set bit that has so many set bits below it; there must be one.
VS_DEVICE int node_at(uint64_t word, int depth) {
  for (; depth > 0; --depth) word &= word - 1;
  const uint32_t low = static_cast<uint32_t>(word);
  return low != 0 ? vs::lowest_bit(low) : 32 + vs::lowest_bit(static_cast<uint32_t>(word >> 32));
}

// The sealed tiles of one run, for the packed rows of one block.
template <typename T, class Shape>
VS_KERNEL void VS_BOUNDS(kAttentionThreads, Shape::kBlocks)
    path_sealed(TreeAttention p, AttentionWorkspace work) {
  constexpr int kKeys = Shape::kKeys, kTile = Shape::kTile, kPitch = Shape::kPitch;
  vs::Shared shared;
  T* queries = shared.array<T>(Shape::kRows * kPitch);
  T* keys = shared.array<T>(4 * kTile);
  T* values = keys + 2 * kTile;
  AttentionBlock at = attention_block<Shape>(p);
  // No row has more sealed than a path of all nodes would; all of it is committed.
  at.keys = at.fresh = sealed_below(at.length + p.T);
  const int64_t begin = int64_t{at.split} * kPathRun;
  const int64_t end = begin + kPathRun < at.keys ? begin + kPathRun : at.keys;
  if (begin >= end) return;
  const auto fetch = [&](int64_t first) {
    const int stage = static_cast<int>((first - begin) / kKeys % 2) * kTile;
    load_slots<T, Shape>(p, at, first, keys + stage, values + stage);
  };
  fetch(begin);
  load_queries<T, Shape>(p, at, queries);
  vs::copy_commit();

  const int first_row = static_cast<int>(vs::warp_index()) * 16;
  int64_t sealed[2];
  VS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int m = at.first_row + first_row + static_cast<int>(vs::lane_index()) / 4 + half * 8;
    sealed[half] =
        m < at.M ? sealed_below(at.length + nodes_in(path_word(p, at.b, m / at.group, at.length))) : 0;
  }
  float sums[Shape::kHead / 8][4] = {};
  float maximum[2] = {-vs::infinity(), -vs::infinity()}, total[2] = {0.0f, 0.0f};
  const float scale = p.scale * 1.44269504f;  // powers of two from here on
  const bool has_rows = at.first_row + first_row < at.M;
  for (int64_t first = begin; first < end; first += kKeys) {
    const int stage = static_cast<int>((first - begin) / kKeys % 2) * kTile;
    if (first + kKeys < end) fetch(first + kKeys);
    vs::copy_commit();
    vs::copy_wait<1>();
    vs::sync_block();
    if (has_rows) {
      AttentionScores<Shape> scores;
      multiply_keys<T, Shape>(scores, queries + first_row * kPitch, keys + stage);
      VS_UNROLL
      for (int half = 0; half < 2; ++half) {
        VS_UNROLL
        for (int n = 0; n < kKeys / 8; ++n) {
          VS_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            scores[n][i] = first < sealed[half] ? scores[n][i] : -vs::infinity();
        }
        soften_row<Shape>(scores, sums, half, scale, maximum[half], total[half]);
      }
      multiply_values<T, Shape>(sums, scores, values + stage);
    }
    vs::sync_block();  // the next round's copies overwrite this stage
  }
  vs::copy_wait<0>();
  VS_UNROLL
  for (int half = 0; half < 2; ++half) store_row<Shape>(p, work, at, sums, half, maximum[half], total[half]);
}

// The newest keys of one packed row, and the merge: the runs in ascending order, then key by key.
template <typename T, int kHead>
VS_KERNEL void VS_BOUNDS(256, 1) path_newest(TreeAttention p, AttentionWorkspace work) {
  static_assert(kNewest <= kAttentionThreads, "a thread a key");
  vs::Shared shared;
  float* query = shared.array<float>(kHead);
  float* weights = shared.array<float>(kNewest);
  int64_t* slots = shared.array<int64_t>(kNewest);
  float* maxima = shared.array<float>(8);  // of the warps
  const int m = static_cast<int>(vs::block_index().x), thread = static_cast<int>(vs::thread_index());
  const int group = static_cast<int>(p.H) / static_cast<int>(p.G), M = static_cast<int>(p.T) * group;
  const int64_t g = vs::block_index().y, b = vs::block_index().z, node = m / group;
  const int64_t head = g * group + m % group;
  const int64_t stale = p.lengths[b], length = stale < 0 ? 0 : stale > p.L ? p.L : stale;
  const uint64_t word = path_word(p, b, node, length);
  const int64_t seen = length + nodes_in(word), sealed = sealed_below(seen);
  const int newest = static_cast<int>(seen - sealed);
  const int runs = static_cast<int>((sealed + kPathRun - 1) / kPathRun);
  const int64_t start = (b * p.G + g) * work.splits * M + m;  // the row's result of the first run
  const int64_t cache = b * p.cache_batch_stride + g * p.cache_head_stride;

  const T* source = static_cast<const T*>(p.queries) + b * p.query_batch_stride + head * p.query_head_stride +
                    node * p.query_row_stride;
  for (int column = thread; column < kHead; column += static_cast<int>(vs::thread_count()))
    query[column] = vs::to_float(source[column]);
  vs::sync_block();

  float score = -vs::infinity();
  if (thread < newest) {
    const int64_t position = sealed + thread;
    const int64_t slot =
        position < length ? position : length + node_at(word, static_cast<int>(position - length));
    const T* key = static_cast<const T*>(p.keys) + cache + slot * p.cache_slot_stride;
    float sum = 0.0f;
    VS_UNROLL
    for (int column = 0; column < kHead; column += kUnit) {
      const Columns<T, kUnit> part = vs::load<Columns<T, kUnit>>(key + column);
      VS_UNROLL
      for (int i = 0; i < kUnit; ++i) sum = vs::fused(query[column + i], vs::to_float(part.at[i]), sum);
    }
    score = vs::multiply(sum, p.scale * 1.44269504f);
    slots[thread] = slot;
  }
  float best = score;
  for (int run = static_cast<int>(vs::lane_index()); run < runs; run += static_cast<int>(vs::kWarpSize)) {
    const float maximum = work.maxima[start + int64_t{run} * M];
    best = maximum > best ? maximum : best;
  }
  best = vs::warp_max(best);
  if (vs::lane_index() == 0) maxima[vs::warp_index()] = best;
  vs::sync_block();
  for (unsigned warp = 0; warp < vs::warp_count(); ++warp) best = maxima[warp] > best ? maxima[warp] : best;
  const float base = weight_base(best);
  if (thread < newest) weights[thread] = vs::exp2_fast(vs::add(score, -base));
  vs::sync_block();

  if (thread >= kHead) return;
  float sum = 0.0f, total = 0.0f;
  for (int run = 0; run < runs; ++run) {
    const int64_t row = start + int64_t{run} * M;
    const float part = work.totals[row];
    if (part == 0.0f) continue;  // nothing was written
    const float weight = vs::exp2_fast(vs::add(work.maxima[row], -base));
    total = vs::fused(weight, part, total);
    sum = vs::fused(weight, work.sums[row * kHead + thread], sum);
  }
  const T* value = static_cast<const T*>(p.values) + cache + thread;
  for (int i = 0; i < newest; ++i) {
    total = vs::add(total, weights[i]);
    sum = vs::fused(weights[i], vs::to_float(value[slots[i] * p.cache_slot_stride]), sum);
  }
  T* out = static_cast<T*>(p.output) + b * p.output_batch_stride + head * p.output_head_stride +
           node * p.output_row_stride;
  // A row that sees nothing: 0. One that sees NaN: NaN, which a comparison with 0 must not hide.
  out[thread] = vs::from_float<T>(total == 0.0f ? 0.0f : vs::divide(sum, total));
}

}  // namespace vispec::kernels
