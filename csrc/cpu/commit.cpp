#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/pool.h"
#include "ops.h"

namespace vispec::cpu {
namespace {

void check_row(const Commit& op, int64_t b) {
  const int64_t count = op.counts[b], length = op.lengths[b];
  if (count < 0 || count > op.D || length < 0)
    throw std::invalid_argument("commit: counts must be from 0 to " + std::to_string(op.D) +
                                " and lengths not negative, got " + std::to_string(count) + " and " +
                                std::to_string(length) + " in row " + std::to_string(b));
  const int64_t* path = op.path + b * op.D;
  for (int64_t j = 0; j < count; ++j)
    if (path[j] < 0 || (j > 0 && path[j] <= path[j - 1]) || length + path[j] >= op.L)
      throw std::invalid_argument("commit: path must ascend from 0 to " + std::to_string(op.L - 1 - length) +
                                  " (L=" + std::to_string(op.L) + ", length " + std::to_string(length) +
                                  "), got " + std::to_string(path[j]) + " at " + std::to_string(j) +
                                  " in row " + std::to_string(b));
}

}  // namespace

void commit(const Commit& op) {
  int64_t moved = 0;
  for (int64_t b = 0; b < op.B; ++b) check_row(op, b);
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t j = 0; j < op.counts[b]; ++j) moved += op.path[b * op.D + j] != j;
  if (moved == 0) return;

  const int64_t slot_bytes = op.head * op.element_bytes;
  const auto move = [&](int64_t index) {
    char* base = static_cast<char*>(op.tensors[index]);
    for (int64_t b = 0; b < op.B; ++b)
      for (int64_t g = 0; g < op.G; ++g) {
        char* head = base + (b * op.batch_stride + g * op.head_stride + op.lengths[b] * op.slot_stride) *
                                op.element_bytes;
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
    parallel_for(op.tensor_count, move);
  else
    for (int64_t index = 0; index < op.tensor_count; ++index) move(index);
}

}  // namespace vispec::cpu
