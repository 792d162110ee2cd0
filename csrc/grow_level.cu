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
      p.R * p.K > kMaxChildren || p.workspace == nullptr) {
    throw std::invalid_argument(
        "grow_level: K must be from 1 to min(V, 64), V at most 524287, R * K at most 16384 and workspace "
        "given, got K=" +
        std::to_string(p.K) + ", V=" + std::to_string(p.V) + ", R=" + std::to_string(p.R) +
        (p.workspace == nullptr ? ", no workspace" : ""));
  }
  const kernels::GrowWorkspace work = kernels::grow_workspace(p);
  const unsigned R = static_cast<unsigned>(p.R), B = static_cast<unsigned>(p.B);
  const uint32_t chunks = kernels::grow_chunks(p.V);
  auto* kernel = p.dtype == DType::f32   ? kernels::grow_scan<float>
                 : p.dtype == DType::f16 ? kernels::grow_scan<vs::Half>
                                         : kernels::grow_scan<vs::BFloat16>;
  vs::launch("grow_level", kernel, {chunks, R, B}, kernels::kGrowThreads,
             kernels::grow_scan_shared_bytes(p.V, p.K), p.stream, p, work, kernels::grow_chunk(p.V),
             static_cast<uint32_t>(kernels::grow_list(p.V, p.K)));
  const uint32_t rows = kernels::grow_rows_at_once(p.R, p.V, p.K);
  const int64_t entries = rows * chunks * p.K, children = p.R * p.K;
  const int64_t wanted = entries > children ? entries : children;
  const unsigned threads = wanted >= kernels::kSelectThreads ? kernels::kSelectThreads
                                                             : static_cast<unsigned>((wanted + 31) / 32 * 32);
  vs::launch("grow_level", kernels::grow_select, {B, 1, 1}, threads,
             kernels::grow_select_shared_bytes(p.R, p.V, p.K), p.stream, p, work, chunks, rows);
}

}  // namespace vispec::cuda
