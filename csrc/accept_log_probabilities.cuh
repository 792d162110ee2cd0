// Kernel body behind accept's walk: what the target thought of each token that was emitted.
#pragma once

#include "accept.cuh"

namespace vispec::kernels {

constexpr uint32_t kLogProbabilityThreads = 1024;

// One block a place of the path; only rows that were visited are read. The maximum is the scan's.
template <typename T>
VS_KERNEL void VS_BOUNDS(kLogProbabilityThreads, 1)
    accept_log_probabilities(Accept p, AcceptWorkspace work, uint32_t chunks) {
  vs::Shared shared;
  double* scratch = shared.array<double>(kLogProbabilityThreads / vs::kWarpSize);
  uint64_t* rank = shared.array<uint64_t>(1);
  const int64_t j = vs::block_index().x, b = vs::block_index().y, out = b * p.D + j;
  const uint32_t thread = vs::thread_index();
  if (j >= p.counts[b]) {
    if (thread == 0) p.log_probabilities[out] = 0.0f;
    return;
  }
  const int64_t node = p.path[out];
  if (vs::warp_index() == 0) {
    const uint64_t found = row_best(work.best + (b * p.T + node) * chunks, chunks);
    if (thread == 0) *rank = found;
  }
  vs::sync_block();
  const T* row = accept_row<T>(p, b, node);
  const uint32_t best = rank_index(*rank);
  const float top = vs::to_float(row[best]);
  // The best token's own 1 is left out: beside it a float would lose all below 6e-8.
  float sum = 0.0f;
  for_each_column(row, 0, static_cast<uint32_t>(p.V), [&](float x, uint32_t column) {
    if (column != best) sum += vs::exp2_fast((x - top) * kLog2E);
  });
  const double others = block_sum(static_cast<double>(sum), scratch);
  if (thread == 0) {
    const float own = vs::to_float(row[p.emitted[out]]);
    p.log_probabilities[out] = own - top - static_cast<float>(log(1.0 + others));
  }
}

}  // namespace vispec::kernels
