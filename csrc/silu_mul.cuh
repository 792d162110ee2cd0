// Kernel body of silu_mul: a thread for each 16 bytes.
#pragma once

#include <cmath>

#include "ops.h"
#include "vectors.cuh"

namespace vispec::kernels {

constexpr uint32_t kSiluThreads = 256;

template <typename T>
VS_KERNEL void VS_BOUNDS(kSiluThreads, 4) silu_mul_rows(SiluMul p) {
  constexpr uint32_t kElements = kVectorElements<T>;
  const int64_t row = vs::block_index().x;
  const int64_t column = (int64_t{vs::block_index().y} * kSiluThreads + vs::thread_index()) * kElements;
  if (column >= p.I) return;
  const int64_t left = p.I - column;
  const uint32_t count = left < kElements ? static_cast<uint32_t>(left) : kElements;
  const vs::Word16 gate = load_elements(static_cast<const T*>(p.gate) + row * p.gate_stride + column, count);
  const vs::Word16 up = load_elements(static_cast<const T*>(p.up) + row * p.up_stride + column, count);
  vs::Word16 result{};
  VS_UNROLL
  for (uint32_t i = 0; i < kElements; ++i) {
    const float x = vs::to_float(vector_element<T>(gate, i));
    float activated = vs::divide(x, 1.0f + expf(-x));
    if (p.parity != 0) activated = rounded<T>(activated);
    set_element(result, i, vs::from_float<T>(activated * vs::to_float(vector_element<T>(up, i))));
  }
  store_elements(static_cast<T*>(p.output) + row * p.output_stride + column, count, result);
}

}  // namespace vispec::kernels
