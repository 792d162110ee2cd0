#include <stdexcept>
#include <string>

#include "rms_norm.cuh"

namespace vispec::cuda {
namespace {

template <typename T>
void run(const RmsNorm& p) {
  using namespace kernels;
  const int64_t vectors = (p.C + kVectorElements<T> - 1) / kVectorElements<T>;
  if (p.C < 1 || vectors > int64_t{kNormThreads} * kNormVectors) {
    throw std::invalid_argument("rms_norm: C must be from 1 to " +
                                std::to_string(kNormThreads * kNormVectors * kVectorElements<T>) + ", got " +
                                std::to_string(p.C));
  }
  if (p.M == 0) return;
  if (vectors <= vs::kWarpSize * kNormVectors) {
    constexpr unsigned kRows = kNormWarpThreads / vs::kWarpSize;
    const unsigned blocks = static_cast<unsigned>((p.M + kRows - 1) / kRows);
    vs::launch("rms_norm", rms_norm_rows<T, true>, {blocks, 1, 1}, kNormWarpThreads, 0, p.stream, p);
  } else {
    const unsigned threads =
        vectors >= kNormThreads ? kNormThreads : static_cast<unsigned>((vectors + 31) / 32 * 32);
    vs::launch("rms_norm", rms_norm_rows<T, false>, {static_cast<unsigned>(p.M), 1, 1}, threads,
               vs::shared_bytes<float>(kNormThreads / vs::kWarpSize), p.stream, p);
  }
}

}  // namespace

void rms_norm(const RmsNorm& p) {
  switch (p.dtype) {
    case DType::f32: return run<float>(p);
    case DType::f16: return run<vs::Half>(p);
    case DType::bf16: return run<vs::BFloat16>(p);
  }
}

}  // namespace vispec::cuda
