// Reading a row of logits and ordering its values: what grow_level and accept share.
#pragma once

#include <cstdint>

#include "rt.h"
#include "vectors.cuh"

namespace vispec {

constexpr float kLog2E = 1.44269504f;

// Integers in the order of the floats (both zeros alike); NaN must be dealt with before.
VS_DEVICE uint32_t order_key(float x) {
  const uint32_t bits = vs::bit_cast<uint32_t>(x + 0.0f);  // -0 + 0 = +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

VS_DEVICE float key_value(uint32_t key) {
  return vs::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// Larger: a higher value, then a lower index. All differ, and none is 0.
VS_DEVICE uint64_t rank_key(uint32_t key, uint32_t index) {
  return uint64_t{key} << 32 | (0xFFFFFFFFu - index);
}
VS_DEVICE uint32_t rank_index(uint64_t rank) { return 0xFFFFFFFFu - static_cast<uint32_t>(rank); }

// Calls f(value, column) for every column in [begin, end) once, over all threads of the block: 16 bytes at a
// time from the first address that is a multiple of 16, single elements before and after it.
template <typename T, typename F>
VS_DEVICE void for_each_column(const T* row, uint32_t begin, uint32_t end, F&& f) {
  constexpr uint32_t kVector = 16 / sizeof(T);
  const uint32_t thread = vs::thread_index(), threads = vs::thread_count();
  const uint32_t beyond = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row + begin) % 16 / sizeof(T));
  uint32_t head = begin + (kVector - beyond) % kVector;
  if (head > end) head = end;
  const uint32_t vectors = (end - head) / kVector;
  const uint32_t tail = head + vectors * kVector;
  // At most kVector - 1 elements on either side: one warp has room for both.
  if (thread < head - begin) f(vs::to_float(row[begin + thread]), begin + thread);
  if (thread < end - tail) f(vs::to_float(row[tail + thread]), tail + thread);
  for (uint32_t i = thread; i < vectors; i += threads) {
    const uint32_t column = head + i * kVector;
    const vs::Word16 word = vs::load_readonly(row + column);
    VS_UNROLL
    for (uint32_t j = 0; j < kVector; ++j) {
      f(vs::to_float(kernels::vector_element<T>(word, j)), column + j);
    }
  }
}

// The largest value over all threads, in every thread; `scratch` holds one element for each warp and may be
// used again after the call.
template <typename T>
VS_DEVICE T block_max(T value, T* scratch) {
  value = vs::warp_max(value);
  if (vs::lane_index() == 0) scratch[vs::warp_index()] = value;
  vs::sync_block();
  T best = scratch[0];
  for (uint32_t w = 1; w < vs::warp_count(); ++w) best = scratch[w] > best ? scratch[w] : best;
  vs::sync_block();
  return best;
}

// The sum over all threads, in every thread, added in a fixed order.
template <typename T>
VS_DEVICE T block_sum(T value, T* scratch) {
  value = vs::warp_sum(value);
  if (vs::lane_index() == 0) scratch[vs::warp_index()] = value;
  vs::sync_block();
  T sum = scratch[0];
  for (uint32_t w = 1; w < vs::warp_count(); ++w) sum += scratch[w];
  vs::sync_block();
  return sum;
}

// Where the running sum of bins first exceeds `limit`, and the sum below that bin. Called by one whole warp;
// every lane gets the answer. The sum of all bins must exceed `limit`.
struct Crossing {
  uint32_t bin;
  uint64_t below;
};
template <typename Bin>
VS_DEVICE Crossing find_crossing(const Bin* bins, uint32_t count, uint64_t limit) {
  const uint32_t lane = vs::lane_index();
  const uint32_t share = (count + vs::kWarpSize - 1) / vs::kWarpSize;
  const uint32_t first = lane * share < count ? lane * share : count;
  const uint32_t last = first + share < count ? first + share : count;
  uint64_t mine = 0;
  for (uint32_t i = first; i < last; ++i) mine += bins[i];
  uint64_t below = vs::warp_prefix_sum(mine) - mine;
  const uint32_t over = vs::ballot(below <= limit && limit < below + mine);
  const uint32_t owner = over != 0 ? static_cast<uint32_t>(vs::lowest_bit(over)) : 0;
  uint32_t bin = first;
  if (lane == owner) {
    while (bin + 1 < last && below + bins[bin] <= limit) below += bins[bin++];
  }
  return {vs::shuffle(bin, owner), vs::shuffle(below, owner)};
}

}  // namespace vispec
