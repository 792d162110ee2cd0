#include "silu_mul.cuh"

namespace vispec::cuda {
namespace {

template <typename T>
void run(const SiluMul& p) {
  constexpr int64_t kColumns = int64_t{kernels::kSiluThreads} * kernels::kVectorElements<T>;
  const unsigned blocks = static_cast<unsigned>((p.I + kColumns - 1) / kColumns);
  vs::launch("silu_mul", kernels::silu_mul_rows<T>, {static_cast<unsigned>(p.M), blocks, 1},
             kernels::kSiluThreads, 0, p.stream, p);
}

}  // namespace

void silu_mul(const SiluMul& p) {
  if (p.M == 0 || p.I == 0) return;
  switch (p.dtype) {
    case DType::f32: return run<float>(p);
    case DType::f16: return run<vs::Half>(p);
    case DType::bf16: return run<vs::BFloat16>(p);
  }
}

}  // namespace vispec::cuda
