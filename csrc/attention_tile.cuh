// What a warp of tree_attention does with a tile in shared memory: 16 rows times its part of the keys.
//
// Fragments as PTX lays them out: a lane holds the rows lane / 4 and lane / 4 + 8 of its warp's 16, called
// halves 0 and 1 here, and of every 8 keys or columns the two from 2 * (lane % 4) on. Rows in shared memory
// are padded by 16 bytes: an odd number of 16-byte units, so ldmatrix meets no bank twice.
#pragma once

#include "attention_load.cuh"

namespace vispec::kernels {

template <class Shape>
using AttentionScores = float[Shape::kPartKeys / 8][4];
template <class Shape>
using AttentionSums = float[Shape::kHead / 8][4];

// Adds 16 rows by 16 times 16 columns, which lie in shared memory, to two results of 8 columns.
template <bool kTransposed, typename T>
VS_DEVICE void multiply_16(float (*sums)[4], const uint32_t (&rows)[4], const T* columns) {
  uint32_t loaded[4];
  vs::load_matrix<4, kTransposed>(loaded, columns);
  const uint32_t low[2] = {loaded[0], loaded[1]}, high[2] = {loaded[2], loaded[3]};
  vs::mma<T>(sums[0], rows, low);
  vs::mma<T>(sums[1], rows, high);
}

// `queries` and `keys` start at the warp's own.
template <typename T, class Shape>
VS_DEVICE void multiply_keys(AttentionScores<Shape>& scores, const T* queries, const T* keys) {
  const unsigned lane = vs::lane_index();
  const T* query = queries + lane % 16 * Shape::kPitch + lane / 16 * 8;
  const T* key = keys + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 8;
  VS_UNROLL
  for (int n = 0; n < Shape::kPartKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
  VS_UNROLL
  for (int k = 0; k < Shape::kHead / 16; ++k) {
    uint32_t a[4];
    vs::load_matrix<4, false>(a, query + k * 16);
    VS_UNROLL
    for (int n = 0; n < Shape::kPartKeys / 16; ++n) {
      multiply_16<false>(&scores[2 * n], a, key + n * 16 * Shape::kPitch + k * 16);
    }
  }
}

template <typename T, class Shape>
VS_DEVICE void multiply_values(AttentionSums<Shape>& sums, const AttentionScores<Shape>& weights,
                               const T* values) {
  const unsigned lane = vs::lane_index();
  const T* value = values + lane % 16 * Shape::kPitch + lane / 16 * 8;
  const auto pair = [](float x, float y) {
    return uint32_t{vs::from_float<T>(x).bits} | uint32_t{vs::from_float<T>(y).bits} << 16;
  };
  VS_UNROLL
  for (int k = 0; k < Shape::kPartKeys / 16; ++k) {
    const float (&left)[4] = weights[2 * k];
    const float (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]),
                           pair(right[2], right[3])};
    VS_UNROLL
    for (int n = 0; n < Shape::kHead / 16; ++n) {
      multiply_16<true>(&sums[2 * n], a, value + k * 16 * Shape::kPitch + n * 16);
    }
  }
}

// Values of tail slots that no row of the block sees become zeros: a stale slot may hold NaN.
template <typename T, class Shape>
VS_DEVICE void clear_unseen(T* values, const uint64_t* words, int W, const AttentionBlock& at,
                            int64_t first) {
  const int key = static_cast<int>(vs::thread_index()) % Shape::kKeys;
  const int64_t slot = first + key, tail = slot - at.length;
  if (tail < 0 || slot >= at.keys) return;
  uint64_t seen = 0;
  for (int row = 0; row < Shape::kRows; ++row) seen |= words[row * W + tail / 64] >> (tail % 64);
  if ((seen & 1u) != 0) return;
  for (int unit = static_cast<int>(vs::thread_index()) / Shape::kKeys; unit < Shape::kHead / 8;
       unit += kAttentionThreads / Shape::kKeys) {
    vs::store<vs::Word16>(values + key * Shape::kPitch + unit * 8, {});
  }
}

// Scores of keys that a row must not see become -inf. `words`: this row's ancestor words.
template <class Shape>
VS_DEVICE void mask_row(AttentionScores<Shape>& scores, int half, const uint64_t* words,
                        const AttentionBlock& at, int64_t first) {
  VS_UNROLL
  for (int n = 0; n < Shape::kPartKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t slot = first + n * 8 + vs::lane_index() % 4 * 2 + i;
      const int64_t tail = slot - at.length;
      const bool seen = tail < 0 || (slot < at.keys && (words[tail / 64] >> (tail % 64) & 1u) != 0);
      if (!seen) scores[n][2 * half + i] = -vs::infinity();
    }
  }
}

// The exponent that weights are relative to; where nothing was seen yet, every weight is 0.
VS_DEVICE float weight_base(float maximum) { return maximum == -vs::infinity() ? 0.0f : maximum; }

// One row's scores become weights; the row's sums so far are scaled to the new maximum.
template <class Shape>
VS_DEVICE void soften_row(AttentionScores<Shape>& scores, AttentionSums<Shape>& sums, int half, float scale,
                          float& maximum, float& total) {
  float best = maximum;
  VS_UNROLL
  for (int n = 0; n < Shape::kPartKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      scores[n][i] *= scale;
      best = scores[n][i] > best ? scores[n][i] : best;
    }
  }
  for (unsigned mask = 1; mask < 4; mask *= 2) {
    const float other = vs::shuffle_xor(best, mask);
    best = other > best ? other : best;
  }
  const float base = weight_base(best);
  const float shrink = vs::exp2_fast(maximum - base);
  maximum = best;
  total *= shrink;
  VS_UNROLL
  for (int n = 0; n < Shape::kPartKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      scores[n][i] = vs::exp2_fast(scores[n][i] - base);
      total += scores[n][i];
    }
  }
  VS_UNROLL
  for (int n = 0; n < Shape::kHead / 8; ++n) {
    sums[n][2 * half] *= shrink;
    sums[n][2 * half + 1] *= shrink;
  }
}

}  // namespace vispec::kernels
