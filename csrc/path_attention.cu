#include "attention_launch.h"
#include "path_attention.cuh"

namespace vispec::cuda {
namespace {

int64_t runs(const TreeAttention& p) { return (p.L + kernels::kPathRun - 1) / kernels::kPathRun; }

template <typename T, int kHead>
void run(const TreeAttention& p) {
  using Shape = kernels::PathShape<kHead>;
  static_assert(kernels::kPathSharedBytes<Shape> <= kLeastSharedLimit, "runs on every GPU");
  const int64_t rows = p.B * p.H * p.T * runs(p), M = packed_rows(p);
  float* start = static_cast<float*>(p.workspace);
  const kernels::AttentionWorkspace work{start, start + rows * kHead, start + rows * (kHead + 1),
                                         static_cast<uint32_t>(runs(p))};
  const unsigned G = static_cast<unsigned>(p.G), B = static_cast<unsigned>(p.B);
  const unsigned row_blocks = static_cast<unsigned>((M + Shape::kRows - 1) / Shape::kRows);
  vs::launch("path_attention", kernels::path_sealed<T, Shape>, {work.splits, G * row_blocks, B},
             kernels::kAttentionThreads, kernels::kPathSharedBytes<Shape>, p.stream, p, work);
  const size_t shared = vs::shared_bytes<float>(kHead) + vs::shared_bytes<float>(kernels::kNewest) +
                        vs::shared_bytes<int64_t>(kernels::kNewest) + vs::shared_bytes<float>(8);
  vs::launch("path_attention", kernels::path_newest<T, kHead>, {static_cast<unsigned>(M), G, B},
             kHead > 128 ? 256 : 128, shared, p.stream, p, work);
}

}  // namespace

int64_t path_attention_workspace_bytes(const TreeAttention& p) {
  return static_cast<int64_t>(sizeof(float)) * p.B * p.H * p.T * runs(p) * (p.head + 2);
}

void path_attention(const TreeAttention& p) {
  check_attention("path_attention", p, kernels::kPathNodes);
  with_head("path_attention", p.head, [&](auto head) {
    if (p.dtype == DType::f16) {
      run<vs::Half, head>(p);
    } else {
      run<vs::BFloat16, head>(p);
    }
  });
}

}  // namespace vispec::cuda
