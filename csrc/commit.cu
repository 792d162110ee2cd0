#include <algorithm>

#include "commit.cuh"

namespace vispec::cuda {

void commit(const Commit& p) {
  const int64_t row_bytes = p.tensor_count == 0 ? 0 : p.G * p.head * p.element_bytes;
  const int64_t feature_bytes = p.features == nullptr ? 0 : p.C * p.feature_bytes;
  const int64_t moving = row_bytes == 0 ? 0 : p.tensor_count;
  const int64_t places = p.features != nullptr ? p.D : p.lengths != nullptr ? 1 : 0;
  if (p.B == 0 || moving + places == 0) return;
  const int64_t columns = std::max<int64_t>((std::max(row_bytes, feature_bytes) + 15) / 16, 1);
  const int64_t blocks = (columns + kernels::kCommitThreads - 1) / kernels::kCommitThreads;
  Commit with = p;
  with.tensor_count = moving;
  vs::launch(
      "commit", kernels::commit_columns,
      {static_cast<unsigned>(blocks), static_cast<unsigned>(moving + places), static_cast<unsigned>(p.B)},
      kernels::kCommitThreads, 0, p.stream, with);
}

}  // namespace vispec::cuda
