// Kernel body of rms_norm: a row is read once, into registers, by a block, or by a warp where it is short.
//
// All of a row's loads are issued before its sum is needed, the weight's too, so that a row costs one round
// trip to memory. A thread holds the same columns whatever the strides, hence the sum has one order.
#pragma once

#include "logits.cuh"
#include "ops.h"
#include "vectors.cuh"

namespace vispec::kernels {

constexpr uint32_t kNormVectors = 4;        // of 16 bytes in a thread's registers, at most
constexpr uint32_t kNormThreads = 1024;     // of a block for one row, at most
constexpr uint32_t kNormWarpThreads = 128;  // of a block for four short rows

// A block's warps share one row, or with kWarpRows each takes a row.
template <typename T, bool kWarpRows>
VS_KERNEL void VS_BOUNDS(kNormThreads, 1) rms_norm_rows(RmsNorm p) {
  constexpr uint32_t kElements = kVectorElements<T>;
  const uint32_t first = kWarpRows ? vs::lane_index() : vs::thread_index();
  const uint32_t step = kWarpRows ? vs::kWarpSize : vs::thread_count();
  const uint32_t C = static_cast<uint32_t>(p.C);
  const int64_t row = kWarpRows ? int64_t{vs::block_index().x} * vs::warp_count() + vs::warp_index()
                                : int64_t{vs::block_index().x};
  if (kWarpRows && row >= p.M) return;  // a warp at a time, and no barrier follows
  const T* hidden = static_cast<const T*>(p.hidden) + row * p.hidden_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  T* output = static_cast<T*>(p.output) + row * p.output_stride;

  vs::Word16 values[kNormVectors], weights[kNormVectors];
  float sum = 0.0f;
  VS_UNROLL
  for (uint32_t i = 0; i < kNormVectors; ++i) {
    const uint32_t column = (first + i * step) * kElements;
    if (column >= C) continue;
    const uint32_t count = C - column;
    values[i] = load_elements(hidden + column, count);
    weights[i] = load_elements(weight + column, count);
    if (p.residual != nullptr) {
      const vs::Word16 before = load_elements(residual + column, count);
      vs::Word16 after{};
      VS_UNROLL
      for (uint32_t j = 0; j < kElements; ++j) {
        const float x =
            vs::to_float(vector_element<T>(before, j)) + vs::to_float(vector_element<T>(values[i], j));
        set_element(after, j, vs::from_float<T>(x));
      }
      values[i] = after;
      store_elements(residual + column, count, after);
    }
    VS_UNROLL
    for (uint32_t j = 0; j < kElements; ++j) {  // zeros behind the row's end
      const float x = vs::to_float(vector_element<T>(values[i], j));
      sum += x * x;
    }
  }
  if constexpr (kWarpRows) {
    sum = vs::warp_sum(sum);
  } else {
    vs::Shared shared;
    sum = block_sum(sum, shared.array<float>(kNormThreads / vs::kWarpSize));
  }
  const float mean = vs::divide(sum, static_cast<float>(C));
  const float inverse = vs::divide(1.0f, vs::square_root(mean + p.epsilon));
  VS_UNROLL
  for (uint32_t i = 0; i < kNormVectors; ++i) {
    const uint32_t column = (first + i * step) * kElements;
    if (column >= C) continue;
    vs::Word16 result{};
    VS_UNROLL
    for (uint32_t j = 0; j < kElements; ++j) {
      float x = vs::to_float(vector_element<T>(values[i], j)) * inverse;
      if (p.parity != 0) x = rounded<T>(x);
      set_element(result, j, vs::from_float<T>(x * vs::to_float(vector_element<T>(weights[i], j))));
    }
    store_elements(output + column, C - column, result);
  }
}

}  // namespace vispec::kernels
