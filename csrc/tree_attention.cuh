// Kernel of tree_attention: partial results of several runs of keys, then their merge.
//
// The T rows of a key-value head's H/G query heads are packed into one dimension (row m: node m / group, head
// m % group), so that keys and values are read once for all of them. A block takes the packed rows of its
// shape and one of `splits` runs of key tiles; where the runs end is computed from the length on the device,
// the grid is not. The first tiles lie wholly in the committed cache and cost no mask; only tiles with tail
// slots look at ancestor bits.
//
// Shapes. 64 rows by 64 keys: each warp 16 rows and all keys of a tile. Up to 16 packed rows (plain decoding,
// small trees) one warp would do all of a tile's work, 128 products and 1,024 exponentials at head 128:
// counted together some 1,200 cycles, where an SM takes in the tile's 32 KiB in 550 if others leave it the
// bandwidth, as they do with few key-value heads. 16 rows by 64 keys give each warp a quarter of the keys,
// for one merge in shared memory a block, and 73 KiB instead of 87 let three blocks share an SM of an H100.
// At head 256 the large shape takes 167 KiB, more than an A100 (163) or a desktop GPU (99) gives a block:
// there, and up to 32 rows anywhere, 32 rows by 32 keys take 84. All of this is counted; none of it has been
// measured yet.
#pragma once

#include "attention_merge.cuh"

namespace vispec::kernels {

template <typename T, class Shape>
VS_KERNEL void VS_BOUNDS(kAttentionThreads, Shape::kBlocks)
    attention_splits(TreeAttention p, AttentionWorkspace work) {
  constexpr int kKeys = Shape::kKeys, kTile = Shape::kTile, kRows = Shape::kRows, kPitch = Shape::kPitch;
  vs::Shared shared;
  T* queries = shared.array<T>(kRows * kPitch);
  T* keys = shared.array<T>(4 * kTile);
  T* values = keys + 2 * kTile;
  uint64_t* words = shared.array<uint64_t>(kRows * kMaxWords);
  const AttentionBlock at = attention_block<Shape>(p);
  const int splits = static_cast<int>(work.splits), tiles = static_cast<int>((at.keys + kKeys - 1) / kKeys);
  const int share = (tiles + splits - 1) / splits;
  const int begin = at.split * share < tiles ? at.split * share : tiles;
  const int end = begin + share < tiles ? begin + share : tiles;
  const auto fetch = [&](int tile) {
    const int stage = (tile - begin) % 2 * kTile;
    load_slots<T, Shape>(p, at, int64_t{tile} * kKeys, keys + stage, values + stage);
  };

  if (begin < end) {
    fetch(begin);  // first, so that rotating the queries overlaps with it
    load_queries<T, Shape>(p, at, queries);
  }
  vs::copy_commit();
  const int W = static_cast<int>(p.W);
  for (int i = static_cast<int>(vs::thread_index()); i < kRows * W; i += kAttentionThreads) {
    const int m = at.first_row + i / W;
    words[i] = m < at.M ? static_cast<uint64_t>(p.ancestors[(at.b * p.T + m / at.group) * p.W + i % W]) : 0;
  }

  float sums[Shape::kHead / 8][4] = {};
  float maximum[2] = {-vs::infinity(), -vs::infinity()}, total[2] = {0.0f, 0.0f};
  const float scale = p.scale * 1.44269504f;  // powers of two from here on
  const int warp = static_cast<int>(vs::warp_index()), part = warp / Shape::kRowTiles;
  const int first_row = warp % Shape::kRowTiles * 16, first_key = part * Shape::kPartKeys;
  const int row = first_row + static_cast<int>(vs::lane_index()) / 4;
  const bool has_rows = at.first_row + first_row < at.M;  // few nodes: the other warps only copy
  for (int tile = begin; tile < end; ++tile) {
    const int stage = (tile - begin) % 2 * kTile;
    const int64_t first = int64_t{tile} * kKeys;
    if (tile + 1 < end) fetch(tile + 1);
    vs::copy_commit();
    vs::copy_wait<1>();
    vs::sync_block();
    const bool masked = first + kKeys > at.length;
    if (masked) {
      clear_unseen<T, Shape>(values + stage, words, W, at, first);
      vs::sync_block();
    }
    if (has_rows) {
      AttentionScores<Shape> scores;
      multiply_keys<T, Shape>(scores, queries + first_row * kPitch, keys + stage + first_key * kPitch);
      VS_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (masked) mask_row<Shape>(scores, half, words + (row + half * 8) * W, at, first + first_key);
        soften_row<Shape>(scores, sums, half, scale, maximum[half], total[half]);
      }
      multiply_values<T, Shape>(sums, scores, values + stage + first_key * kPitch);
    }
    vs::sync_block();  // the next round's copies overwrite this stage
  }
  vs::copy_wait<0>();

  if constexpr (Shape::kParts == 1) {
    VS_UNROLL
    for (int half = 0; half < 2; ++half)
      store_row<Shape>(p, work, at, sums, half, maximum[half], total[half]);
  } else {
    // Nobody reads or copies keys any more.
    static_assert(sizeof(float) * Shape::kParts * kRows * kPitch <= sizeof(T) * 4 * kTile, "sums for keys");
    const AttentionParts parts{static_cast<float*>(static_cast<void*>(keys)),
                               shared.array<float>(Shape::kParts * kRows),
                               shared.array<float>(Shape::kParts * kRows)};
    VS_UNROLL
    for (int half = 0; half < 2; ++half)
      share_part<Shape>(parts, part * kRows + row + half * 8, sums, half, maximum[half], total[half]);
    vs::sync_block();
    store_parts<Shape>(p, work, at, parts);
  }
}

}  // namespace vispec::kernels
