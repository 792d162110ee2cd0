#include "rope_append.cuh"

namespace vispec::cuda {
namespace {

template <typename T, int kCount>
void launch(const RopeAppend& p) {
  const int64_t groups = (p.H + 2 * p.G) * (p.head / kCount);
  const unsigned blocks = static_cast<unsigned>((groups + kernels::kRopeThreads - 1) / kernels::kRopeThreads);
  vs::launch("rope_append", kernels::rope_append_columns<T, kCount>,
             {blocks, static_cast<unsigned>(p.T), static_cast<unsigned>(p.B)}, kernels::kRopeThreads, 0,
             p.stream, p);
}

// 16 bytes at a time where every row of every tensor lets them, one column at a time elsewhere.
template <typename T>
void run(const RopeAppend& p) {
  constexpr int kCount = kernels::kWide<T>;
  const Tail& t = p.tail;
  const int64_t strides = p.query_batch_stride | p.query_head_stride | p.query_row_stride |
                          p.output_batch_stride | p.output_head_stride | p.output_row_stride |
                          p.cache_batch_stride | p.cache_head_stride | p.cache_slot_stride | t.batch_stride |
                          t.head_stride | t.row_stride | p.head | t.rotary / 2;
  uintptr_t starts = 0;
  for (const void* start : {p.queries, static_cast<const void*>(p.output), static_cast<const void*>(p.keys),
                            static_cast<const void*>(p.values), t.keys, t.values, t.cosines, t.sines,
                            t.query_bias, t.key_bias, t.value_bias})
    starts |= reinterpret_cast<uintptr_t>(start);
  if (strides % kCount == 0 && starts % 16 == 0) {
    launch<T, kCount>(p);
  } else {
    launch<T, 1>(p);
  }
}

}  // namespace

void rope_append(const RopeAppend& p) {
  switch (p.dtype) {
    case DType::f32: return run<float>(p);
    case DType::f16: return run<vs::Half>(p);
    case DType::bf16: return run<vs::BFloat16>(p);
  }
}

}  // namespace vispec::cuda
