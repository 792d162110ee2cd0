#include <stdexcept>
#include <string>

#include "tree_attention.cuh"

namespace vispec::cuda {
namespace {

int64_t row_blocks(const TreeAttention& p) {
  return (p.T * (p.H / p.G) + kernels::kRows - 1) / kernels::kRows;
}

// Enough blocks to fill 132 SMs twice, as long as a run keeps at least 256 keys of a full cache: with 30 rows
// the partial results of shorter runs are more than a fifth of the bytes of their keys and values.
int64_t splits(const TreeAttention& p) {
  const int64_t blocks = p.B * p.G * row_blocks(p);
  const int64_t wanted = (264 + blocks - 1) / blocks, most = (p.L + 255) / 256;
  return wanted < most ? wanted : most;
}

template <typename T, int kHead>
void run_head(const TreeAttention& p, const kernels::AttentionWorkspace& work) {
  const unsigned rows = static_cast<unsigned>(p.G * row_blocks(p)), B = static_cast<unsigned>(p.B);
  const auto splits = p.tail.keys == nullptr ? kernels::attention_splits<T, kHead, false>
                                             : kernels::attention_splits<T, kHead, true>;
  vs::launch("tree_attention", splits, {work.splits, rows, B}, kernels::kAttentionThreads,
             kernels::attention_shared_bytes(kHead, p.W), p.stream, p, work);
  const unsigned M = static_cast<unsigned>(p.T * (p.H / p.G)), G = static_cast<unsigned>(p.G);
  vs::launch("tree_attention", kernels::attention_merge<T>, {M, G, B}, (kHead + 31) / 32 * 32, 0, p.stream, p,
             work);
}

template <typename T>
void run(const TreeAttention& p, const kernels::AttentionWorkspace& work) {
  switch (p.head) {
    case 64: return run_head<T, 64>(p, work);
    case 80: return run_head<T, 80>(p, work);
    case 96: return run_head<T, 96>(p, work);
    case 128: return run_head<T, 128>(p, work);
    case 256: return run_head<T, 256>(p, work);
  }
  throw std::invalid_argument("tree_attention: head must be 64, 80, 96, 128 or 256, got " +
                              std::to_string(p.head));
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
  return static_cast<int64_t>(sizeof(float)) * p.B * p.H * p.T * splits(p) * (p.head + 2);
}

bool tree_attention_fits(int64_t head, int64_t W) {
  return kernels::attention_shared_bytes(head, W) <= vs::shared_limit();
}

void tree_attention(const TreeAttention& p) {
  check(p);
  const int64_t rows = p.B * p.H * p.T * splits(p);
  float* start = static_cast<float*>(p.workspace);
  const kernels::AttentionWorkspace work{start, start + rows * p.head, start + rows * (p.head + 1),
                                         static_cast<uint32_t>(splits(p))};
  if (p.dtype == DType::f16) {
    run<vs::Half>(p, work);
  } else {
    run<vs::BFloat16>(p, work);
  }
}

}  // namespace vispec::cuda
