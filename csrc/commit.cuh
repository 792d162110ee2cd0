// Kernel body of commit: all tensors in one launch, one thread a column of 16 bytes (or as much as is
// aligned).
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

VS_KERNEL void VS_BOUNDS(kCommitThreads, 5) commit_columns(Commit p) {
  const int64_t tensor = vs::block_index().y, b = vs::block_index().z;
  const int64_t length = p.lengths[b];
  int64_t count = p.counts[b];
  if (count > p.D) count = p.D;
  if (length < 0 || length >= p.L) return;  // stale values during a graph's warm-up
  unsigned char* base = static_cast<unsigned char*>(p.tensors[tensor]) +
                        (b * p.batch_stride + length * p.slot_stride) * p.element_bytes;
  const int64_t* path = p.path + b * p.D;
  const int64_t room = p.L - length;
  const uintptr_t together = reinterpret_cast<uintptr_t>(base) |
                             static_cast<uintptr_t>(p.head_stride * p.element_bytes) |
                             static_cast<uintptr_t>(p.slot_stride * p.element_bytes) |
                             static_cast<uintptr_t>(p.head * p.element_bytes);
  if (together % 16 == 0) {
    move_columns<vs::Word16>(p, base, path, count, room);
  } else if (together % 8 == 0) {
    move_columns<vs::Word8>(p, base, path, count, room);
  } else if (together % 4 == 0) {
    move_columns<uint32_t>(p, base, path, count, room);
  } else if (together % 2 == 0) {
    move_columns<uint16_t>(p, base, path, count, room);
  } else {
    move_columns<uint8_t>(p, base, path, count, room);
  }
}

}  // namespace vispec::kernels
