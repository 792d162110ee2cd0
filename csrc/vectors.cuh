// Rows of numbers in registers, 16 bytes at a time: whole vectors where the address allows, single elements
// elsewhere (odd strides, the end of a row), with the same values in the same places.
#pragma once

#include "rt.h"

namespace vispec::kernels {

template <typename T>
constexpr uint32_t kVectorElements = 16 / sizeof(T);

template <typename T>
VS_DEVICE T vector_element(const vs::Word16& vector, uint32_t i) {
  if constexpr (sizeof(T) == 4) {
    return vs::bit_cast<T>(vector.v[i]);
  } else {
    return {static_cast<uint16_t>(vector.v[i / 2] >> (i % 2 * 16))};
  }
}

// The element must be zero before.
template <typename T>
VS_DEVICE void set_element(vs::Word16& vector, uint32_t i, T x) {
  if constexpr (sizeof(T) == 4) {
    vector.v[i] = vs::bit_cast<uint32_t>(x);
  } else {
    vector.v[i / 2] |= uint32_t{x.bits} << (i % 2 * 16);
  }
}

// `count` elements from `source`, at most a vector; zeros behind them.
template <typename T>
VS_DEVICE vs::Word16 load_elements(const T* source, uint32_t count) {
  if (count >= kVectorElements<T> && vs::aligned<vs::Word16>(source)) return vs::load<vs::Word16>(source);
  vs::Word16 vector{};
  VS_UNROLL
  for (uint32_t i = 0; i < kVectorElements<T>; ++i) {
    if (i < count) set_element(vector, i, source[i]);
  }
  return vector;
}

template <typename T>
VS_DEVICE void store_elements(T* target, uint32_t count, const vs::Word16& vector) {
  if (count >= kVectorElements<T> && vs::aligned<vs::Word16>(target)) {
    vs::store<vs::Word16>(target, vector);
    return;
  }
  VS_UNROLL
  for (uint32_t i = 0; i < kVectorElements<T>; ++i) {
    if (i < count) target[i] = vector_element<T>(vector, i);
  }
}

// To the dtype and back: where the model rounds.
template <typename T>
VS_DEVICE float rounded(float x) {
  return vs::to_float(vs::from_float<T>(x));
}

}  // namespace vispec::kernels
