// Partial results of tree_attention and their merges: of the parts of a block's keys, in shared memory, then
// of the runs of keys, in the workspace. Both go in ascending order, so that nothing depends on timing.
#pragma once

#include "attention_tile.cuh"

namespace vispec::kernels {

// Results of one run of keys, before division by the sum: arrays over [B, G, splits, M].
struct AttentionWorkspace {
  float* sums;    // [.., head] weighted values
  float* maxima;  // in powers of two
  float* totals;  // 0: the run holds no visible key and `sums` was not written
  uint32_t splits;
};

VS_DEVICE int64_t workspace_row(const TreeAttention& p, const AttentionWorkspace& work,
                                const AttentionBlock& at, int m) {
  return ((at.b * p.G + at.g) * work.splits + at.split) * at.M + m;
}

template <class Shape>
VS_DEVICE void store_row(const TreeAttention& p, const AttentionWorkspace& work, const AttentionBlock& at,
                         const AttentionSums<Shape>& sums, int half, float maximum, float total) {
  for (unsigned mask = 1; mask < 4; mask *= 2) total += vs::shuffle_xor(total, mask);
  const unsigned lane = vs::lane_index();
  const int m = at.first_row + static_cast<int>(vs::warp_index() * 16 + lane / 4) + half * 8;
  if (m >= at.M) return;
  const int64_t row = workspace_row(p, work, at, m);
  if (lane % 4 == 0) {
    work.maxima[row] = maximum;
    work.totals[row] = total;
  }
  if (total == 0.0f) return;
  float* out = work.sums + row * Shape::kHead + lane % 4 * 2;
  VS_UNROLL
  for (int n = 0; n < Shape::kHead / 8; ++n) {
    vs::store<vs::Word8>(out + n * 8, {{vs::bit_cast<uint32_t>(sums[n][2 * half]),
                                        vs::bit_cast<uint32_t>(sums[n][2 * half + 1])}});
  }
}

// What the parts of a block's keys have found, in shared memory: arrays over [kParts, kRows].
struct AttentionParts {
  float* sums;  // [.., kPitch]: 8 rows by 8 floats of a store meet every bank once
  float* maxima;
  float* totals;
};

template <class Shape>
VS_DEVICE void share_part(const AttentionParts& parts, int row, const AttentionSums<Shape>& sums, int half,
                          float maximum, float total) {
  for (unsigned mask = 1; mask < 4; mask *= 2) total += vs::shuffle_xor(total, mask);
  const unsigned lane = vs::lane_index();
  if (lane % 4 == 0) {
    parts.maxima[row] = maximum;
    parts.totals[row] = total;
  }
  float* out = parts.sums + row * Shape::kPitch + lane % 4 * 2;
  VS_UNROLL
  for (int n = 0; n < Shape::kHead / 8; ++n) {
    vs::store<vs::Word8>(out + n * 8, {{vs::bit_cast<uint32_t>(sums[n][2 * half]),
                                        vs::bit_cast<uint32_t>(sums[n][2 * half + 1])}});
  }
}

// All threads of the block, four columns of a row each at a time.
template <class Shape>
VS_DEVICE void store_parts(const TreeAttention& p, const AttentionWorkspace& work, const AttentionBlock& at,
                           const AttentionParts& parts) {
  constexpr int kColumns = Shape::kHead / 4;
  for (int i = static_cast<int>(vs::thread_index()); i < Shape::kRows * kColumns; i += kAttentionThreads) {
    const int row = i / kColumns, column = i % kColumns * 4, m = at.first_row + row;
    if (m >= at.M) return;
    float maximum = parts.maxima[row];
    VS_UNROLL
    for (int part = 1; part < Shape::kParts; ++part) {
      const float other = parts.maxima[part * Shape::kRows + row];
      maximum = other > maximum ? other : maximum;
    }
    const float base = weight_base(maximum);
    float total = 0.0f, sums[4] = {};
    VS_UNROLL
    for (int part = 0; part < Shape::kParts; ++part) {
      const int place = part * Shape::kRows + row;
      const float weight = vs::exp2_fast(parts.maxima[place] - base);
      const vs::Word16 found = vs::load<vs::Word16>(parts.sums + place * Shape::kPitch + column);
      total += weight * parts.totals[place];
      VS_UNROLL
      for (int j = 0; j < 4; ++j) sums[j] += weight * vs::bit_cast<float>(found.v[j]);
    }
    const int64_t out = workspace_row(p, work, at, m);
    if (column == 0) {
      work.maxima[out] = maximum;
      work.totals[out] = total;
    }
    if (total == 0.0f) continue;
    vs::store<vs::Word16>(work.sums + out * Shape::kHead + column,
                          {{vs::bit_cast<uint32_t>(sums[0]), vs::bit_cast<uint32_t>(sums[1]),
                            vs::bit_cast<uint32_t>(sums[2]), vs::bit_cast<uint32_t>(sums[3])}});
  }
}

// One block a packed row, one thread a column. Each warp reads what all runs say of the row at once, a lane a
// run, then its columns of eight runs at a time: with a branch a run, each would wait for the one before.
template <typename T>
VS_KERNEL void VS_BOUNDS(256, 1) attention_merge(TreeAttention p, AttentionWorkspace work) {
  const int m = static_cast<int>(vs::block_index().x);
  const int group = static_cast<int>(p.H) / static_cast<int>(p.G), M = static_cast<int>(p.T) * group;
  const int64_t g = vs::block_index().y, b = vs::block_index().z;
  const int64_t start = (b * p.G + g) * work.splits * M + m, column = vs::thread_index();
  const int splits = static_cast<int>(work.splits), lane = static_cast<int>(vs::lane_index());
  const int kWarp = static_cast<int>(vs::kWarpSize);
  float best = -vs::infinity();
  for (int run = lane; run < splits; run += kWarp) {
    const float maximum = work.maxima[start + int64_t{run} * M];
    best = maximum > best ? maximum : best;
  }
  const float base = weight_base(vs::warp_max(best));
  float sum = 0.0f, total = 0.0f;
  for (int first = 0; first < splits; first += kWarp) {
    float own_total = 0.0f, own_weight = 0.0f;
    if (first + lane < splits) {
      const int64_t row = start + int64_t{first + lane} * M;
      own_total = work.totals[row];
      own_weight = vs::exp2_fast(work.maxima[row] - base);
    }
    for (int next = 0; next < kWarp && first + next < splits; next += 8) {
      VS_UNROLL
      for (int i = next; i < next + 8; ++i) {
        const float part = vs::shuffle(own_total, static_cast<unsigned>(i));
        const float weight = vs::shuffle(own_weight, static_cast<unsigned>(i));
        const bool written = part != 0.0f && column < p.head;
        const float value = written ? work.sums[(start + int64_t{first + i} * M) * p.head + column] : 0.0f;
        total += weight * part;
        sum += weight * value;
      }
    }
  }
  if (column >= p.head) return;
  T* out = static_cast<T*>(p.output) + b * p.output_batch_stride +
           (g * group + m % group) * p.output_head_stride + m / group * p.output_row_stride;
  // A row that sees nothing: 0. One that sees NaN: NaN, which a comparison with 0 must not hide.
  out[column] = vs::from_float<T>(total == 0.0f ? 0.0f : vs::divide(sum, total));
}

}  // namespace vispec::kernels
