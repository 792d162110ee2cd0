#include <stdexcept>
#include <string>

#include "grow_level.cuh"

namespace vispec::cuda {

void grow_level(const GrowLevel& p) {
  constexpr int64_t kMaxChildren = 16384;  // 128 KiB of shared memory
  if (p.K < 1 || p.K > kernels::kGrowGroups / 2 || p.K > p.V || p.R * p.K > kMaxChildren) {
    throw std::invalid_argument(
        "grow_level: K must be from 1 to min(V, 64) and R * K at most 16384, got K=" + std::to_string(p.K) +
        ", V=" + std::to_string(p.V) + ", R=" + std::to_string(p.R));
  }
  const vs::Dim3 rows{static_cast<unsigned>(p.R), static_cast<unsigned>(p.B), 1};
  auto* kernel = p.dtype == DType::f32   ? kernels::grow_rows<float>
                 : p.dtype == DType::f16 ? kernels::grow_rows<vs::Half>
                                         : kernels::grow_rows<vs::BFloat16>;
  vs::launch("grow_level", kernel, rows, kernels::kGrowThreads, kernels::grow_rows_shared_bytes(), p.stream,
             p);
  const int64_t children = p.R * p.K;
  const unsigned threads = children >= 1024 ? 1024 : static_cast<unsigned>((children + 31) / 32 * 32);
  vs::launch("grow_level", kernels::grow_select, {static_cast<unsigned>(p.B), 1, 1}, threads,
             kernels::grow_select_shared_bytes(children), p.stream, p);
}

}  // namespace vispec::cuda
