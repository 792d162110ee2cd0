// What a block of tree_attention reads: its rows of queries and its tiles of keys and values, in shared
// memory.
//
// Without a tail all of it is copied. With one, the queries are rotated on the way, and the last slots of the
// last tiles come from the tail instead of the cache, where the first row block of their run appends them. No
// block reads those slots from the cache, so that nobody waits for the append.
#pragma once

#include "rope.cuh"

namespace vispec::kernels {

constexpr uint32_t kAttentionThreads = 128;
constexpr int kMaxWords = 4;  // of ancestors: 256 tail slots
constexpr int kUnit = 8;      // columns in 16 bytes

// How a block divides its work: `kBlockRows` packed rows, tiles of `kTileKeys` keys, and four warps that take
// 16 rows each. Where there are fewer than four such shares of rows, the warps of one divide each tile's
// keys.
template <int kHeadColumns, int kBlockRows, int kTileKeys>
struct AttentionShape {
  static constexpr int kHead = kHeadColumns, kRows = kBlockRows, kKeys = kTileKeys;
  static constexpr int kPitch = kHead + 8;  // elements; of floats too, in `share_part`
  static constexpr int kTile = kKeys * kPitch;
  static constexpr int kRowTiles = kRows / 16, kParts = 4 / kRowTiles, kPartKeys = kKeys / kParts;
  static_assert(kRows % 16 == 0 && kRowTiles * kParts == 4 && kPartKeys % 16 == 0, "whole products");
  // Queries, two stages of keys and values, the ancestor words, and what the parts of the keys have found.
  static constexpr size_t kSharedBytes = vs::shared_bytes<uint16_t>(kRows * kPitch) +
                                         vs::shared_bytes<uint16_t>(4 * kTile) +
                                         vs::shared_bytes<uint64_t>(kRows * kMaxWords) +
                                         (kParts > 1 ? 2 * vs::shared_bytes<float>(kParts * kRows) : 0);
  // What an SM of an H100 holds (228 KiB, of which a block costs one more), as far as registers shall allow.
  static constexpr unsigned kSharedBlocks = (228u << 10) / (kSharedBytes + 1024);
  static constexpr unsigned kBlocks = kSharedBlocks < 3 ? kSharedBlocks : 3;
};

struct AttentionBlock {
  int64_t b, g;
  int split, first_row, M, group;  // 32 bits: every row is divided by `group`, and 64 bits take a subroutine
  int64_t length, keys;            // committed slots, and with the tail
  int64_t fresh;                   // the first slot that the cache does not hold yet; `keys` without a tail
};

template <class Shape>
VS_DEVICE AttentionBlock attention_block(const TreeAttention& p) {
  AttentionBlock at;
  const unsigned row_blocks = vs::grid_size().y / static_cast<unsigned>(p.G);
  at.split = static_cast<int>(vs::block_index().x);
  at.first_row = static_cast<int>(vs::block_index().y % row_blocks) * Shape::kRows;
  at.g = vs::block_index().y / row_blocks;
  at.b = vs::block_index().z;
  at.group = static_cast<int>(p.H) / static_cast<int>(p.G);
  at.M = static_cast<int>(p.T) * at.group;
  const int64_t length = p.lengths[at.b];
  at.length = length < 0 ? 0 : length > p.L ? p.L : length;  // stale values during a graph's warm-up
  at.keys = at.length + p.S < p.L ? at.length + p.S : p.L;
  at.fresh = p.tail.keys == nullptr ? at.keys : at.length + p.S - p.T;
  return at;
}

// The row of the tables for one node, and what a head's rows of a projection have added.
template <typename T>
VS_DEVICE const T* table_row(const TreeAttention& p, const AttentionBlock& at, const void* table, int64_t t) {
  return static_cast<const T*>(table) + (at.b * p.T + t) * p.tail.rotary;
}
template <typename T>
VS_DEVICE const T* bias_of(const TreeAttention& p, const void* bias, int64_t head) {
  return bias == nullptr ? nullptr : static_cast<const T*>(bias) + head * p.head;
}

template <typename T, class Shape>
VS_DEVICE void load_queries(const TreeAttention& p, const AttentionBlock& at, T* tile) {
  constexpr int kUnits = Shape::kHead / kUnit;
  for (int i = static_cast<int>(vs::thread_index()); i < Shape::kRows * kUnits; i += kAttentionThreads) {
    const int row = i / kUnits, column = i % kUnits * kUnit;
    const int m = at.first_row + row, safe = m < at.M ? m : 0;
    const int64_t t = safe / at.group, head = at.g * at.group + safe % at.group;
    const T* source = static_cast<const T*>(p.queries) + at.b * p.query_batch_stride +
                      head * p.query_head_stride + t * p.query_row_stride;
    T* place = tile + row * Shape::kPitch + column;
    if (p.tail.keys != nullptr) {
      Columns<T, kUnit> columns{};
      if (m < at.M) {
        columns = rotated<T, kUnit>(source, bias_of<T>(p, p.tail.query_bias, head),
                                    table_row<T>(p, at, p.tail.cosines, t),
                                    table_row<T>(p, at, p.tail.sines, t), p.tail.rotary, column);
      }
      vs::store<Columns<T, kUnit>>(place, columns);
    } else {
      vs::copy_async<16>(place, source + column, m < at.M ? 16 : 0);
    }
  }
}

// A tile of one cache's slots; slots past the last are zeros, whatever the cache holds there (NaN times 0 is
// NaN).
template <typename T, class Shape>
VS_DEVICE void copy_slots(const TreeAttention& p, const AttentionBlock& at, const void* cache, int64_t first,
                          T* tile) {
  constexpr int kUnits = Shape::kHead / kUnit;
  const T* base = static_cast<const T*>(cache) + at.b * p.cache_batch_stride + at.g * p.cache_head_stride;
  for (int i = static_cast<int>(vs::thread_index()); i < Shape::kKeys * kUnits; i += kAttentionThreads) {
    const int key = i / kUnits, column = i % kUnits * kUnit;
    const bool there = first + key < at.keys;
    if (there && first + key >= at.fresh) continue;
    const int64_t slot = there ? first + key : 0;
    vs::copy_async<16>(tile + key * Shape::kPitch + column, base + slot * p.cache_slot_stride + column,
                       there ? 16 : 0);
  }
}

// The slots that `copy_slots` left out, from the tail: biased, keys rotated, and appended to the caches once.
template <typename T, class Shape>
VS_DEVICE void fill_fresh(const TreeAttention& p, const AttentionBlock& at, int64_t first, T* keys,
                          T* values) {
  constexpr int kUnits = Shape::kHead / kUnit;
  const Tail& tail = p.tail;
  const int64_t source = at.b * tail.batch_stride + at.g * tail.head_stride;
  const int64_t cache = at.b * p.cache_batch_stride + at.g * p.cache_head_stride;
  for (int i = static_cast<int>(vs::thread_index()); i < Shape::kKeys * kUnits; i += kAttentionThreads) {
    const int key = i / kUnits, column = i % kUnits * kUnit;
    const int64_t slot = first + key, t = slot - at.fresh;
    if (t < 0 || slot >= at.keys) continue;
    const int64_t row = source + t * tail.row_stride;
    const Columns<T, kUnit> new_key = rotated<T, kUnit>(
        static_cast<const T*>(tail.keys) + row, bias_of<T>(p, tail.key_bias, at.g),
        table_row<T>(p, at, tail.cosines, t), table_row<T>(p, at, tail.sines, t), tail.rotary, column);
    const Columns<T, kUnit> new_value = with_bias<T, kUnit>(static_cast<const T*>(tail.values) + row,
                                                            bias_of<T>(p, tail.value_bias, at.g), column);
    vs::store<Columns<T, kUnit>>(keys + key * Shape::kPitch + column, new_key);
    vs::store<Columns<T, kUnit>>(values + key * Shape::kPitch + column, new_value);
    if (at.first_row != 0) continue;
    const int64_t place = cache + slot * p.cache_slot_stride + column;
    vs::store<Columns<T, kUnit>>(static_cast<T*>(p.keys) + place, new_key);
    vs::store<Columns<T, kUnit>>(static_cast<T*>(p.values) + place, new_value);
  }
}

template <typename T, class Shape>
VS_DEVICE void load_slots(const TreeAttention& p, const AttentionBlock& at, int64_t first, T* keys,
                          T* values) {
  copy_slots<T, Shape>(p, at, p.keys, first, keys);
  copy_slots<T, Shape>(p, at, p.values, first, values);
  if (first + Shape::kKeys > at.fresh) fill_fresh<T, Shape>(p, at, first, keys, values);
}

}  // namespace vispec::kernels
