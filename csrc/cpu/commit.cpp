#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/pool.h"
#include "ops.h"

namespace vispec::cpu {
namespace {

void check_row(const Commit& op, int64_t b) {
  const int64_t count = op.counts[b], start = op.starts[b * op.starts_stride];
  if (count < 0 || count > op.D || start < 0)
    throw std::invalid_argument("commit: counts must be from 0 to " + std::to_string(op.D) +
                                " and starts not negative, got " + std::to_string(count) + " and " +
                                std::to_string(start) + " in row " + std::to_string(b));
  // Nodes there are: slots behind the start, rows of features.
  int64_t nodes = std::numeric_limits<int64_t>::max();
  if (op.tensor_count > 0) nodes = op.L - start;
  if (op.features != nullptr) nodes = std::min(nodes, op.T);
  const int64_t* path = op.path + b * op.D;
  for (int64_t j = 0; j < count; ++j)
    if (path[j] < 0 || (j > 0 && path[j] <= path[j - 1]) || path[j] >= nodes)
      throw std::invalid_argument("commit: path must ascend from 0 to " + std::to_string(nodes - 1) +
                                  ", got " + std::to_string(path[j]) + " at " + std::to_string(j) +
                                  " in row " + std::to_string(b));
}

void move(const Commit& op) {
  int64_t moved = 0;
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t j = 0; j < op.counts[b]; ++j) moved += op.path[b * op.D + j] != j;
  if (moved == 0) return;

  const int64_t slot_bytes = op.head * op.element_bytes;
  const auto move_one = [&](int64_t index) {
    char* base = static_cast<char*>(op.tensors[index]);
    for (int64_t b = 0; b < op.B; ++b)
      for (int64_t g = 0; g < op.G; ++g) {
        const int64_t start = op.starts[b * op.starts_stride];
        char* head =
            base + (b * op.batch_stride + g * op.head_stride + start * op.slot_stride) * op.element_bytes;
        // Ascending paths: slot j was read, or is not a source, before it is written.
        for (int64_t j = 0; j < op.counts[b]; ++j) {
          const int64_t from = op.path[b * op.D + j];
          if (from != j)
            std::memcpy(head + j * op.slot_stride * op.element_bytes,
                        head + from * op.slot_stride * op.element_bytes, static_cast<size_t>(slot_bytes));
        }
      }
  };
  // Below this, waking a second thread costs more than the copy.
  constexpr int64_t kWorthSharing = int64_t{1} << 20;
  if (moved * op.G * slot_bytes * op.tensor_count >= kWorthSharing)
    parallel_for(op.tensor_count, move_one);
  else
    for (int64_t index = 0; index < op.tensor_count; ++index) move_one(index);
}

void gather(const Commit& op) {
  const size_t bytes = static_cast<size_t>(op.C * op.feature_bytes);
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t j = 0; j < op.D; ++j) {
      const int64_t out = b * op.D + j;
      char* to = static_cast<char*>(op.picked) + out * op.C * op.feature_bytes;
      if (j < op.counts[b]) {
        const int64_t row = b * op.features_batch_stride + op.path[out] * op.features_row_stride;
        std::memcpy(to, static_cast<const char*>(op.features) + row * op.feature_bytes, bytes);
        op.tokens[out] = op.emitted[out];
      } else {
        std::memset(to, 0, bytes);
        op.tokens[out] = 0;
      }
    }
}

void advance(const Commit& op) {
  for (int64_t b = 0; b < op.B; ++b) {
    const int64_t count = op.counts[b];
    op.lengths[b] += count;
    op.positions[b] += count;
    op.remaining[b] -= count;
    if (count > 0) op.roots[b] = op.emitted[b * op.D + count - 1];
  }
}

}  // namespace

void commit(const Commit& op) {
  for (int64_t b = 0; b < op.B; ++b) check_row(op, b);
  if (op.tensor_count > 0) move(op);
  if (op.features != nullptr) gather(op);
  if (op.lengths != nullptr) advance(op);
}

}  // namespace vispec::cpu
