#include <stdexcept>
#include <string>
#include <type_traits>

#include "tree_attention.cuh"

namespace vispec::cuda {
namespace {

template <int kHead>
using Large = kernels::AttentionShape<kHead, 64, 64>;
template <int kHead>
using Small = kernels::AttentionShape<kHead, kHead == 256 ? 32 : 16, kHead == 256 ? 32 : 64>;

// What a block may ask for on the GPUs that have the least of those with asynchronous copies.
constexpr size_t kLeastSharedLimit = 99 << 10;

template <class Function>
auto with_head(int64_t head, const Function& function) {
  switch (head) {
    case 64: return function(std::integral_constant<int, 64>{});
    case 80: return function(std::integral_constant<int, 80>{});
    case 96: return function(std::integral_constant<int, 96>{});
    case 128: return function(std::integral_constant<int, 128>{});
    case 256: return function(std::integral_constant<int, 256>{});
  }
  throw std::invalid_argument("tree_attention: head must be 64, 80, 96, 128 or 256, got " +
                              std::to_string(head));
}

int64_t packed_rows(const TreeAttention& p) { return p.T * (p.H / p.G); }

// Calls function(shape) with the shape that serves these sizes on the current device.
template <class Function>
auto with_shape(const TreeAttention& p, const Function& function) {
  return with_head(p.head, [&](auto head) {
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

void check(const TreeAttention& p) {
  if (p.dtype == DType::f32)
    throw std::invalid_argument("tree_attention: dtype must be f16 or bf16, got f32");
  if (p.G < 1 || p.H % p.G != 0 || p.T < 1 || p.S < 1 || p.S > 256 || p.W != (p.S + 63) / 64 || p.L < 1) {
    throw std::invalid_argument(
        "tree_attention: H must be a multiple of G, S from 1 to 256 and W ceil(S / 64), got H=" +
        std::to_string(p.H) + ", G=" + std::to_string(p.G) + ", T=" + std::to_string(p.T) +
        ", S=" + std::to_string(p.S) + ", W=" + std::to_string(p.W) + ", L=" + std::to_string(p.L));
  }
  const Tail& t = p.tail;
  const int64_t strides = p.query_batch_stride | p.query_head_stride | p.query_row_stride |
                          p.cache_batch_stride | p.cache_head_stride | p.cache_slot_stride | t.batch_stride |
                          t.head_stride | t.row_stride | t.rotary / 2;
  uintptr_t starts = 0;
  for (const void* start : {p.queries, static_cast<const void*>(p.keys), static_cast<const void*>(p.values),
                            t.keys, t.values, t.cosines, t.sines, t.query_bias, t.key_bias, t.value_bias})
    starts |= reinterpret_cast<uintptr_t>(start);
  if (strides % 8 != 0 || starts % 16 != 0) {
    throw std::invalid_argument(
        "tree_attention: queries, keys, values and the tail must start at multiples of 16 bytes, "
        "with strides that are multiples of 8 elements and rotary a multiple of 16");
  }
}

}  // namespace

int64_t tree_attention_workspace_bytes(const TreeAttention& p) {
  const int64_t runs = with_shape(p, [&](auto shape) { return splits<decltype(shape)>(p); });
  return static_cast<int64_t>(sizeof(float)) * p.B * p.H * p.T * runs * (p.head + 2);
}

void tree_attention(const TreeAttention& p) {
  check(p);
  with_shape(p, [&](auto shape) {
    if (p.dtype == DType::f16) {
      run<vs::Half, decltype(shape)>(p);
    } else {
      run<vs::BFloat16, decltype(shape)>(p);
    }
  });
}

}  // namespace vispec::cuda
