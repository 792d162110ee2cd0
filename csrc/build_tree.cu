#include <stdexcept>
#include <string>

#include "build_tree.cuh"

namespace vispec::cuda {

void build_tree(const BuildTree& p) {
  constexpr int64_t kMaxCandidates = 12288;  // 148 KiB of shared memory
  if (p.T < 1 || p.T > 256 || p.T > p.N + 1 || p.W != (p.T + 63) / 64 || p.N > kMaxCandidates) {
    throw std::invalid_argument(
        "build_tree: T must be from 1 to min(N + 1, 256), W ceil(T / 64) and N at most 12288, got T=" +
        std::to_string(p.T) + ", W=" + std::to_string(p.W) + ", N=" + std::to_string(p.N));
  }
  const int64_t wanted = p.N > p.T ? p.N : p.T;
  const unsigned threads = wanted >= 1024 ? 1024 : static_cast<unsigned>((wanted + 31) / 32 * 32);
  vs::launch("build_tree", kernels::build_tree_rows, {static_cast<unsigned>(p.B), 1, 1}, threads,
             kernels::build_tree_shared_bytes(p.N, p.T), p.stream, p);
}

}  // namespace vispec::cuda
