// What the launchers of tree_attention and path_attention share.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace vispec::cuda {

// What a block may ask for on the GPUs that have the least of those with asynchronous copies.
constexpr size_t kLeastSharedLimit = 99 << 10;

template <class Function>
auto with_head(const char* op, int64_t head, const Function& function) {
  switch (head) {
    case 64: return function(std::integral_constant<int, 64>{});
    case 80: return function(std::integral_constant<int, 80>{});
    case 96: return function(std::integral_constant<int, 96>{});
    case 128: return function(std::integral_constant<int, 128>{});
    case 256: return function(std::integral_constant<int, 256>{});
  }
  throw std::invalid_argument(std::string(op) + ": head must be 64, 80, 96, 128 or 256, got " +
                              std::to_string(head));
}

inline int64_t packed_rows(const TreeAttention& p) { return p.T * (p.H / p.G); }

inline void check_attention(const char* op, const TreeAttention& p, int64_t most_slots) {
  if (p.dtype == DType::f32)
    throw std::invalid_argument(std::string(op) + ": dtype must be f16 or bf16, got f32");
  if (p.G < 1 || p.H % p.G != 0 || p.T < 1 || p.S < 1 || p.S > most_slots || p.W != (p.S + 63) / 64 ||
      p.L < 1) {
    throw std::invalid_argument(
        std::string(op) + ": H must be a multiple of G, S from 1 to " + std::to_string(most_slots) +
        " and W ceil(S / 64), got H=" + std::to_string(p.H) + ", G=" + std::to_string(p.G) +
        ", T=" + std::to_string(p.T) + ", S=" + std::to_string(p.S) + ", W=" + std::to_string(p.W) +
        ", L=" + std::to_string(p.L));
  }
  const Tail& t = p.tail;
  const int64_t strides = p.query_batch_stride | p.query_head_stride | p.query_row_stride |
                          p.cache_batch_stride | p.cache_head_stride | p.cache_slot_stride | t.batch_stride |
                          t.head_stride | t.row_stride | t.rotary / 2;
  uintptr_t starts = 0;
  for (const void* start : {p.queries, static_cast<const void*>(p.keys), static_cast<const void*>(p.values),
                            t.keys, t.values, t.cosines, t.sines, t.query_bias, t.key_bias, t.value_bias})
    starts |= reinterpret_cast<uintptr_t>(start);
  if (strides % 8 != 0 || starts % 16 != 0) {
    throw std::invalid_argument(std::string(op) +
                                ": queries, keys, values and the tail must start at multiples of 16 bytes, "
                                "with strides that are multiples of 8 elements and rotary a multiple of 16");
  }
}

}  // namespace vispec::cuda
