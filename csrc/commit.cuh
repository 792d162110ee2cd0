// Kernel body of commit: all tensors in one launch, one thread a column of 16 bytes (or as much as is
// aligned). Behind the slices of the grid that move tensors there is one for each place of the path, which
// gathers a feature; the first of them advances the row's state. No block reads what another one writes.
#pragma once

#include "ops.h"
#include "rt.h"

namespace vispec::kernels {

constexpr uint32_t kCommitThreads = 128;
constexpr int kCommitBatch = 8;  // rows in flight in a thread; covers the usual longest path in one go

// Moves one column of one head. Nodes ascend, hence path[j] >= j: a store to place j can only hit the source
// of a later row if path[i] = j for an i > j, which cannot be. So no row is lost, whatever the batches.
template <typename Word>
VS_DEVICE void move_column(unsigned char* column, int64_t slot_bytes, const int64_t* path, int64_t count,
                           int64_t room) {
  for (int64_t j0 = 0; j0 < count; j0 += kCommitBatch) {
    Word rows[kCommitBatch];
    bool moves[kCommitBatch];
    VS_UNROLL
    for (int i = 0; i < kCommitBatch; ++i) {
      const int64_t node = j0 + i < count ? path[j0 + i] : -1;
      moves[i] = node > j0 + i && node < room;  // in place already, or stale: left alone
      if (moves[i]) rows[i] = vs::load<Word>(column + node * slot_bytes);
    }
    VS_UNROLL
    for (int i = 0; i < kCommitBatch; ++i) {
      if (moves[i]) vs::store<Word>(column + (j0 + i) * slot_bytes, rows[i]);
    }
  }
}

template <typename Word>
VS_DEVICE void move_columns(const Commit& p, unsigned char* base, const int64_t* path, int64_t count,
                            int64_t room) {
  const int64_t a_head = p.head * p.element_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t threads = int64_t{vs::grid_size().x} * kCommitThreads;
  for (int64_t i = int64_t{vs::block_index().x} * kCommitThreads + vs::thread_index(); i < p.G * a_head;
       i += threads) {
    unsigned char* column = base + i / a_head * p.head_stride * p.element_bytes + i % a_head * sizeof(Word);
    move_column<Word>(column, p.slot_stride * p.element_bytes, path, count, room);
  }
}

VS_DEVICE void move_tensor(const Commit& p, int64_t tensor, int64_t b, int64_t count) {
  const int64_t start = p.starts[b * p.starts_stride];
  if (start < 0 || start >= p.L) return;  // stale values during a graph's warm-up
  unsigned char* base = static_cast<unsigned char*>(p.tensors[tensor]) +
                        (b * p.batch_stride + start * p.slot_stride) * p.element_bytes;
  const uintptr_t together = reinterpret_cast<uintptr_t>(base) |
                             static_cast<uintptr_t>(p.head_stride * p.element_bytes) |
                             static_cast<uintptr_t>(p.slot_stride * p.element_bytes) |
                             static_cast<uintptr_t>(p.head * p.element_bytes);
  vs::with_widest_word(together, [&](auto word) {
    move_columns<decltype(word)>(p, base, p.path + b * p.D, count, p.L - start);
  });
}

// One place of the path: the feature of its node and the token behind it, zeros where there is none.
VS_DEVICE void gather_place(const Commit& p, int64_t b, int64_t place, bool there) {
  const int64_t out = b * p.D + place, bytes = p.C * p.feature_bytes;
  const int64_t node = there ? p.path[out] : -1;
  const bool known = node >= 0 && node < p.T;
  const unsigned char* from =
      static_cast<const unsigned char*>(p.features) +
      (b * p.features_batch_stride + (known ? node : 0) * p.features_row_stride) * p.feature_bytes;
  unsigned char* to = static_cast<unsigned char*>(p.picked) + out * bytes;
  const uintptr_t together =
      reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes);
  vs::with_widest_word(together, [&](auto word) {
    using Word = decltype(word);
    const int64_t width = sizeof(Word), threads = int64_t{vs::grid_size().x} * kCommitThreads;
    for (int64_t i = int64_t{vs::block_index().x} * kCommitThreads + vs::thread_index(); i < bytes / width;
         i += threads) {
      vs::store<Word>(to + i * width, known ? vs::load<Word>(from + i * width) : word);
    }
  });
  if (vs::block_index().x == 0 && vs::thread_index() == 0) p.tokens[out] = there ? p.emitted[out] : 0;
}

VS_DEVICE void advance_row(const Commit& p, int64_t b, int64_t count) {
  p.lengths[b] += count;
  p.positions[b] += count;
  p.remaining[b] -= count;
  if (count > 0) p.roots[b] = p.emitted[b * p.D + count - 1];
}

VS_KERNEL void VS_BOUNDS(kCommitThreads, 5) commit_columns(Commit p) {
  const int64_t slice = vs::block_index().y, b = vs::block_index().z;
  int64_t count = p.counts[b];
  count = count < 0 ? 0 : count > p.D ? p.D : count;
  if (slice < p.tensor_count) {
    move_tensor(p, slice, b, count);
    return;
  }
  const int64_t place = slice - p.tensor_count;
  if (p.features != nullptr) gather_place(p, b, place, place < count);
  if (p.lengths != nullptr && place == 0 && vs::block_index().x == 0 && vs::thread_index() == 0) {
    advance_row(p, b, count);
  }
}

}  // namespace vispec::kernels
