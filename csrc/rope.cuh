// A row of a projection on its way to attention: bias, then rotation, several columns at a time. Every step
// is rounded to T, as the elementwise code of a model in PyTorch rounds it, so that both give the same bits.
#pragma once

#include "ops.h"
#include "rt.h"

namespace vispec::kernels {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Columns {
  T at[kCount];
};

// As many columns as one access of 16 bytes takes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

template <typename T, int kCount>
VS_DEVICE Columns<T, kCount> with_bias(const T* row, const T* bias, int64_t column) {
  Columns<T, kCount> x = vs::load<Columns<T, kCount>>(row + column);
  if (bias == nullptr) return x;
  const Columns<T, kCount> b = vs::load<Columns<T, kCount>>(bias + column);
  VS_UNROLL
  for (int i = 0; i < kCount; ++i)
    x.at[i] = vs::from_float<T>(vs::add(vs::to_float(x.at[i]), vs::to_float(b.at[i])));
  return x;
}

// The columns from `column` on; `row`, `bias` and the tables start at column 0. A group of columns must not
// straddle rotary / 2 or rotary.
template <typename T, int kCount>
VS_DEVICE Columns<T, kCount> rotated(const T* row, const T* bias, const T* cosines, const T* sines,
                                     int64_t rotary, int64_t column) {
  Columns<T, kCount> x = with_bias<T, kCount>(row, bias, column);
  if (column >= rotary) return x;
  const bool first_half = column < rotary / 2;
  const int64_t partner = first_half ? column + rotary / 2 : column - rotary / 2;
  const Columns<T, kCount> y = with_bias<T, kCount>(row, bias, partner);
  const Columns<T, kCount> cosine = vs::load<Columns<T, kCount>>(cosines + column);
  const Columns<T, kCount> sine = vs::load<Columns<T, kCount>>(sines + column);
  VS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float other = first_half ? -vs::to_float(y.at[i]) : vs::to_float(y.at[i]);
    const T kept = vs::from_float<T>(vs::multiply(vs::to_float(x.at[i]), vs::to_float(cosine.at[i])));
    const T turned = vs::from_float<T>(vs::multiply(other, vs::to_float(sine.at[i])));
    x.at[i] = vs::from_float<T>(vs::add(vs::to_float(kept), vs::to_float(turned)));
  }
  return x;
}

}  // namespace vispec::kernels
