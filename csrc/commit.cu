#include "commit.cuh"

namespace vispec::cuda {

void commit(const Commit& p) {
  const int64_t head_bytes = p.head * p.element_bytes;
  if (p.B == 0 || p.G == 0 || p.tensor_count == 0 || head_bytes == 0) return;
  const int64_t columns = (p.G * head_bytes + 15) / 16;
  const int64_t blocks = (columns + kernels::kCommitThreads - 1) / kernels::kCommitThreads;
  vs::launch(
      "commit", kernels::commit_columns,
      {static_cast<unsigned>(blocks), static_cast<unsigned>(p.tensor_count), static_cast<unsigned>(p.B)},
      kernels::kCommitThreads, 0, p.stream, p);
}

}  // namespace vispec::cuda
