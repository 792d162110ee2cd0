#include <stdexcept>
#include <string>

#include "grow_level.cuh"
#include "sampling.h"

namespace vispec::cuda {

int64_t grow_level_workspace_bytes(int64_t B, int64_t R, int64_t V, int64_t K) {
  return static_cast<int64_t>(sizeof(uint64_t)) * B * R * kernels::grow_chunks(V) * (K + 1);
}

void grow_level(const GrowLevel& p) {
  constexpr int64_t kMaxChildren = 16384;  // 128 KiB of shared memory
  if (p.K < 1 || p.K > kernels::kGrowGroups / 2 || p.K > p.V || p.V > kMaxVocabulary ||
      p.R * p.K > kMaxChildren || p.arrivals == nullptr || p.workspace == nullptr) {
    throw std::invalid_argument(
        "grow_level: K must be from 1 to min(V, 64), V at most 524287, R * K at most 16384, arrivals and "
        "workspace given, got K=" +
        std::to_string(p.K) + ", V=" + std::to_string(p.V) + ", R=" + std::to_string(p.R) +
        (p.arrivals == nullptr ? ", no arrivals" : "") + (p.workspace == nullptr ? ", no workspace" : ""));
  }
  const kernels::GrowSizes sizes = kernels::grow_sizes(p);
  auto* kernel = p.dtype == DType::f32   ? kernels::grow_level_blocks<float>
                 : p.dtype == DType::f16 ? kernels::grow_level_blocks<vs::Half>
                                         : kernels::grow_level_blocks<vs::BFloat16>;
  vs::launch("grow_level", kernel, {sizes.chunks, static_cast<unsigned>(p.R), static_cast<unsigned>(p.B)},
             kernels::kGrowThreads, kernels::grow_shared_bytes(sizes, p.K), p.stream, p,
             kernels::grow_workspace(p), sizes);
}

}  // namespace vispec::cuda
