// Kernel bodies of tree_attention: partial results of several runs of keys, then their merge in ascending
// order.
//
// The T rows of a key-value head's H/G query heads are packed into one dimension (row m: node m / group, head
// m % group), so that keys and values are read once for all of them. A block takes 64 packed rows and one of
// `splits` runs of 64-key tiles; where the runs end is computed from the length on the device, the grid is
// not. The first tiles lie wholly in the committed cache and cost no mask; only tiles with tail slots look at
// ancestor bits. Rows in shared memory are padded by 16 bytes: an odd number of 16-byte units, so ldmatrix
// meets no bank twice.
#pragma once

#include "attention_load.cuh"

namespace vispec::kernels {

// Queries, two stages of keys and values, and the ancestor words.
inline size_t attention_shared_bytes(int64_t head, int64_t W) {
  const size_t tile = vs::shared_bytes<uint16_t>(static_cast<size_t>(kKeys * (head + 8)));
  return 5 * tile + vs::shared_bytes<uint64_t>(static_cast<size_t>(kRows * W));
}

// Results of one run of keys, before division by the sum: arrays over [B, G, splits, M].
struct AttentionWorkspace {
  float* sums;    // [.., head] weighted values
  float* maxima;  // in powers of two
  float* totals;  // 0: the run holds no visible key and `sums` was not written
  uint32_t splits;
};

// scores[n] of keys 8n + 2(lane%4), +1 for rows lane/4 and lane/4 + 8 of the warp.
template <typename T, int kHead>
VS_DEVICE void multiply_keys(float (&scores)[kKeys / 8][4], const T* queries, const T* keys) {
  const unsigned lane = vs::lane_index();
  const T* query = queries + (vs::warp_index() * 16 + lane % 16) * kPitch<kHead> + lane / 16 * 8;
  const T* key = keys + (lane / 16 * 8 + lane % 8) * kPitch<kHead> + lane / 8 % 2 * 8;
  VS_UNROLL
  for (int n = 0; n < kKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
  VS_UNROLL
  for (int k = 0; k < kHead / 16; ++k) {
    uint32_t a[4];
    vs::load_matrix<4, false>(a, query + k * 16);
    VS_UNROLL
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      vs::load_matrix<4, false>(b, key + n * 16 * kPitch<kHead> + k * 16);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      vs::mma<T>(scores[2 * n], a, low);
      vs::mma<T>(scores[2 * n + 1], a, high);
    }
  }
}

template <typename T, int kHead>
VS_DEVICE void multiply_values(float (&sums)[kHead / 8][4], const float (&weights)[kKeys / 8][4],
                               const T* values) {
  const unsigned lane = vs::lane_index();
  const T* value = values + lane % 16 * kPitch<kHead> + lane / 16 * 8;
  const auto pair = [](float x, float y) {
    return uint32_t{vs::from_float<T>(x).bits} | uint32_t{vs::from_float<T>(y).bits} << 16;
  };
  VS_UNROLL
  for (int k = 0; k < kKeys / 16; ++k) {
    const float (&left)[4] = weights[2 * k];
    const float (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]),
                           pair(right[2], right[3])};
    VS_UNROLL
    for (int n = 0; n < kHead / 16; ++n) {
      uint32_t b[4];
      vs::load_matrix<4, true>(b, value + k * 16 * kPitch<kHead> + n * 16);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      vs::mma<T>(sums[2 * n], a, low);
      vs::mma<T>(sums[2 * n + 1], a, high);
    }
  }
}

// Values of tail slots that no row of the block sees become zeros: a stale slot may hold NaN.
template <typename T, int kHead>
VS_DEVICE void clear_unseen(T* values, const uint64_t* words, int W, const AttentionBlock& at,
                            int64_t first) {
  const int key = static_cast<int>(vs::thread_index()) % kKeys;
  const int64_t slot = first + key, tail = slot - at.length;
  if (tail < 0 || slot >= at.keys) return;
  uint64_t seen = 0;
  for (int row = 0; row < kRows; ++row) seen |= words[row * W + tail / 64] >> (tail % 64);
  if ((seen & 1u) != 0) return;
  for (int unit = static_cast<int>(vs::thread_index()) / kKeys; unit < kHead / 8;
       unit += kAttentionThreads / kKeys) {
    vs::store<vs::Word16>(values + key * kPitch<kHead> + unit * 8, {});
  }
}

// Scores of keys that a row must not see become -inf. `words`: this row's ancestor words.
VS_DEVICE void mask_row(float (&scores)[kKeys / 8][4], int half, const uint64_t* words,
                        const AttentionBlock& at, int64_t first) {
  VS_UNROLL
  for (int n = 0; n < kKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t slot = first + n * 8 + vs::lane_index() % 4 * 2 + i;
      const int64_t tail = slot - at.length;
      const bool seen = tail < 0 || (slot < at.keys && (words[tail / 64] >> (tail % 64) & 1u) != 0);
      if (!seen) scores[n][2 * half + i] = -vs::infinity();
    }
  }
}

// One row's scores become weights; the row's sums so far are scaled to the new maximum.
template <int kHead>
VS_DEVICE void soften_row(float (&scores)[kKeys / 8][4], float (&sums)[kHead / 8][4], int half, float scale,
                          float& maximum, float& total) {
  float best = maximum;
  VS_UNROLL
  for (int n = 0; n < kKeys / 8; ++n) {
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
  const float base = best == -vs::infinity() ? 0.0f : best;  // nothing seen yet: every weight is 0
  const float shrink = vs::exp2_fast(maximum - base);
  maximum = best;
  total *= shrink;
  VS_UNROLL
  for (int n = 0; n < kKeys / 8; ++n) {
    VS_UNROLL
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      scores[n][i] = vs::exp2_fast(scores[n][i] - base);
      total += scores[n][i];
    }
  }
  VS_UNROLL
  for (int n = 0; n < kHead / 8; ++n) {
    sums[n][2 * half] *= shrink;
    sums[n][2 * half + 1] *= shrink;
  }
}

template <int kHead>
VS_DEVICE void store_row(const TreeAttention& p, const AttentionWorkspace& work, const AttentionBlock& at,
                         const float (&sums)[kHead / 8][4], int half, float maximum, float total) {
  for (unsigned mask = 1; mask < 4; mask *= 2) total += vs::shuffle_xor(total, mask);
  const unsigned lane = vs::lane_index();
  const int64_t m = at.first_row + vs::warp_index() * 16 + lane / 4 + half * 8;
  if (m >= at.M) return;
  const int64_t row = ((at.b * p.G + at.g) * work.splits + at.split) * at.M + m;
  if (lane % 4 == 0) {
    work.maxima[row] = maximum;
    work.totals[row] = total;
  }
  if (total == 0.0f) return;
  float* out = work.sums + row * kHead + lane % 4 * 2;
  VS_UNROLL
  for (int n = 0; n < kHead / 8; ++n) {
    vs::store<vs::Word8>(out + n * 8, {{vs::bit_cast<uint32_t>(sums[n][2 * half]),
                                        vs::bit_cast<uint32_t>(sums[n][2 * half + 1])}});
  }
}

template <typename T, int kHead, bool kTail>
VS_KERNEL void VS_BOUNDS(kAttentionThreads, 1) attention_splits(TreeAttention p, AttentionWorkspace work) {
  constexpr int kTile = kKeys * kPitch<kHead>;
  vs::Shared shared;
  T* queries = shared.array<T>(kRows * kPitch<kHead>);
  T* keys = shared.array<T>(2 * kTile);
  T* values = shared.array<T>(2 * kTile);
  uint64_t* words = shared.array<uint64_t>(static_cast<size_t>(kRows * p.W));
  const AttentionBlock at = attention_block(p);
  const int64_t tiles = (at.keys + kKeys - 1) / kKeys;
  const int64_t share = (tiles + work.splits - 1) / work.splits;
  const int64_t begin = at.split * share < tiles ? at.split * share : tiles;
  const int64_t end = begin + share < tiles ? begin + share : tiles;

  const int W = static_cast<int>(p.W);
  for (int i = static_cast<int>(vs::thread_index()); i < kRows * W; i += kAttentionThreads) {
    const int64_t m = at.first_row + i / W;
    words[i] = m < at.M ? static_cast<uint64_t>(p.ancestors[(at.b * p.T + m / at.group) * p.W + i % W]) : 0;
  }
  load_queries<T, kHead, kTail>(p, at, queries);
  if (begin < end) load_slots<T, kHead, kTail>(p, at, begin * kKeys, keys, values);
  vs::copy_commit();

  float sums[kHead / 8][4] = {};
  float maximum[2] = {-vs::infinity(), -vs::infinity()}, total[2] = {0.0f, 0.0f};
  const float scale = p.scale * 1.44269504f;  // powers of two from here on
  const unsigned row = vs::warp_index() * 16 + vs::lane_index() / 4;
  const bool has_rows = at.first_row + vs::warp_index() * 16 < at.M;  // few nodes: the other warps only copy
  for (int64_t tile = begin; tile < end; ++tile) {
    const int stage = static_cast<int>((tile - begin) % 2);
    if (tile + 1 < end) {
      const int next = (1 - stage) * kTile;
      load_slots<T, kHead, kTail>(p, at, (tile + 1) * kKeys, keys + next, values + next);
    }
    vs::copy_commit();
    vs::copy_wait<1>();
    vs::sync_block();
    const bool masked = (tile + 1) * kKeys > at.length;
    if (masked) {
      clear_unseen<T, kHead>(values + stage * kTile, words, W, at, tile * kKeys);
      vs::sync_block();
    }
    if (has_rows) {
      float scores[kKeys / 8][4];
      multiply_keys<T, kHead>(scores, queries, keys + stage * kTile);
      VS_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (masked) mask_row(scores, half, words + (row + half * 8) * W, at, tile * kKeys);
        soften_row<kHead>(scores, sums, half, scale, maximum[half], total[half]);
      }
      multiply_values<T, kHead>(sums, scores, values + stage * kTile);
    }
    vs::sync_block();  // the next round's copies overwrite this stage
  }
  vs::copy_wait<0>();
  VS_UNROLL
  for (int half = 0; half < 2; ++half) store_row<kHead>(p, work, at, sums, half, maximum[half], total[half]);
}

// One block a packed row: the runs in ascending order, so that the result does not depend on timing.
template <typename T>
VS_KERNEL void VS_BOUNDS(256, 1) attention_merge(TreeAttention p, AttentionWorkspace work) {
  const int64_t m = vs::block_index().x, g = vs::block_index().y, b = vs::block_index().z;
  const int64_t group = p.H / p.G, M = p.T * group;
  const int64_t first = (b * p.G + g) * work.splits * M + m;
  float best = -vs::infinity();
  for (uint32_t s = 0; s < work.splits; ++s) {
    const float maximum = work.maxima[first + s * M];
    best = maximum > best ? maximum : best;
  }
  const int64_t column = vs::thread_index();
  if (column >= p.head) return;
  float sum = 0.0f, total = 0.0f;
  for (uint32_t s = 0; s < work.splits; ++s) {
    const int64_t row = first + s * M;
    const float part = work.totals[row];
    if (part == 0.0f) continue;
    const float weight = vs::exp2_fast(work.maxima[row] - best);
    total += weight * part;
    sum += weight * work.sums[row * p.head + column];
  }
  T* out = static_cast<T*>(p.output) + b * p.output_batch_stride +
           (g * group + m % group) * p.output_head_stride + m / group * p.output_row_stride;
  out[column] =
      vs::from_float<T>(total > 0.0f ? vs::divide(sum, total) : 0.0f);  // a row that sees nothing: 0
}

}  // namespace vispec::kernels
