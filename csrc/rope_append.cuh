// Kernel body of rope_append: one thread for each group of columns of the queries, keys and values of a
// token.
#pragma once

#include "rope.cuh"

namespace vispec::kernels {

constexpr uint32_t kRopeThreads = 128;

// Groups of kCount columns: those of H query heads, then of G key heads, then of G value heads.
template <typename T, int kCount>
VS_KERNEL void VS_BOUNDS(kRopeThreads, 1) rope_append_columns(RopeAppend p) {
  const uint32_t groups = static_cast<uint32_t>(p.head) / kCount;
  const uint32_t i = vs::block_index().x * kRopeThreads + vs::thread_index();
  const int64_t head = i / groups, column = i % groups * kCount;  // 32 bits: 64 take a subroutine
  const int64_t t = vs::block_index().y, b = vs::block_index().z;
  if (head >= p.H + 2 * p.G) return;
  const Tail& tail = p.tail;
  const int64_t table = (b * p.T + t) * tail.rotary;
  const T* cosines = static_cast<const T*>(tail.cosines) + table;
  const T* sines = static_cast<const T*>(tail.sines) + table;
  const auto moved = [&](const void* row, const void* bias, int64_t shared, int64_t rotary) {
    const T* own_bias = bias == nullptr ? nullptr : static_cast<const T*>(bias) + shared * p.head;
    return rotated<T, kCount>(static_cast<const T*>(row), own_bias, cosines, sines, rotary, column);
  };
  using Group = Columns<T, kCount>;
  if (head < p.H) {
    const T* row = static_cast<const T*>(p.queries) + b * p.query_batch_stride + head * p.query_head_stride +
                   t * p.query_row_stride;
    T* out = static_cast<T*>(p.output) + b * p.output_batch_stride + head * p.output_head_stride +
             t * p.output_row_stride;
    vs::store<Group>(out + column, moved(row, tail.query_bias, head, tail.rotary));
    return;
  }
  const int64_t length = p.lengths[b];
  const int64_t slot = (length < 0 ? 0 : length > p.L ? p.L : length) + p.offset + t;
  if (slot >= p.L) return;
  const bool is_key = head < p.H + p.G;
  const int64_t g = is_key ? head - p.H : head - p.H - p.G;
  const T* row = static_cast<const T*>(is_key ? tail.keys : tail.values) + b * tail.batch_stride +
                 g * tail.head_stride + t * tail.row_stride;
  T* out = static_cast<T*>(is_key ? p.keys : p.values) + b * p.cache_batch_stride + g * p.cache_head_stride +
           slot * p.cache_slot_stride;
  vs::store<Group>(out + column,
                   moved(row, is_key ? tail.key_bias : tail.value_bias, g, is_key ? tail.rotary : 0));
}

}  // namespace vispec::kernels
