#include "attention_launch.h"
#include "tree_attention.cuh"

namespace vispec::cuda {
namespace {

template <int kHead>
using Large = kernels::AttentionShape<kHead, 64, 64>;
template <int kHead>
using Small = kernels::AttentionShape<kHead, kHead == 256 ? 32 : 16, kHead == 256 ? 32 : 64>;

// Calls function(shape) with the shape that serves these sizes on the current device.
template <class Function>
auto with_shape(const TreeAttention& p, const Function& function) {
  return with_head("tree_attention", p.head, [&](auto head) {
    static_assert(Small<head>::kSharedBytes <= kLeastSharedLimit, "runs on every GPU");
    bool large = packed_rows(p) > Small<head>::kRows;
    if constexpr (Large<head>::kSharedBytes > kLeastSharedLimit)
      large = large && Large<head>::kSharedBytes <= vs::shared_limit();
    return large ? function(Large<head>{}) : function(Small<head>{});
  });
}

template <class Shape>
int64_t row_blocks(const TreeAttention& p) {
  return (packed_rows(p) + Shape::kRows - 1) / Shape::kRows;
}

// Enough blocks to fill 132 SMs twice, as long as the partial results do not weigh too much: with 30 rows,
// those of runs shorter than 256 keys are more than a fifth of the bytes of their keys and values; with 16,
// those of 128 keys are a quarter. Two tiles a run also keep both stages of its block in flight from the
// start.
template <class Shape>
int64_t splits(const TreeAttention& p) {
  const int64_t blocks = p.B * p.G * row_blocks<Shape>(p);
  const int64_t least_keys = packed_rows(p) <= 16 ? 128 : 256;
  const int64_t wanted = (264 + blocks - 1) / blocks, most = (p.L + least_keys - 1) / least_keys;
  return wanted < most ? wanted : most;
}

template <typename T, class Shape>
void run(const TreeAttention& p) {
  const int64_t runs = splits<Shape>(p), rows = p.B * p.H * p.T * runs;
  float* start = static_cast<float*>(p.workspace);
  const kernels::AttentionWorkspace work{start, start + rows * p.head, start + rows * (p.head + 1),
                                         static_cast<uint32_t>(runs)};
  const unsigned G = static_cast<unsigned>(p.G), B = static_cast<unsigned>(p.B);
  vs::launch("tree_attention", kernels::attention_splits<T, Shape>,
             {work.splits, G * static_cast<unsigned>(row_blocks<Shape>(p)), B}, kernels::kAttentionThreads,
             Shape::kSharedBytes, p.stream, p, work);
  vs::launch("tree_attention", kernels::attention_merge<T>, {static_cast<unsigned>(packed_rows(p)), G, B},
             (Shape::kHead + 31) / 32 * 32, 0, p.stream, p, work);
}

}  // namespace

int64_t tree_attention_workspace_bytes(const TreeAttention& p) {
  const int64_t runs = with_shape(p, [&](auto shape) { return splits<decltype(shape)>(p); });
  return static_cast<int64_t>(sizeof(float)) * p.B * p.H * p.T * runs * (p.head + 2);
}

void tree_attention(const TreeAttention& p) {
  check_attention("tree_attention", p, 256);
  with_shape(p, [&](auto shape) {
    if (p.dtype == DType::f16) {
      run<vs::Half, decltype(shape)>(p);
    } else {
      run<vs::BFloat16, decltype(shape)>(p);
    }
  });
}

}  // namespace vispec::cuda
