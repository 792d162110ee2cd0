#include <stdexcept>
#include <string>

#include "int8_linear.cuh"

namespace vispec::cuda {
namespace {

template <typename T, int kGroups, bool kAligned>
void run(const Int8Linear& p) {
  constexpr int kRows = 8 * kGroups;
  const int64_t row_blocks = (p.M + kRows - 1) / kRows;
  const int64_t output_blocks = (p.N + kernels::kInt8Outputs - 1) / kernels::kInt8Outputs;
  vs::launch("int8_linear", kernels::int8_linear_rows<T, kGroups, kAligned>,
             {static_cast<unsigned>(row_blocks * output_blocks), 1, 1}, kernels::kInt8Threads,
             vs::shared_bytes<float>(kernels::kInt8Warps * kernels::kInt8Part<kGroups>), p.stream, p);
}

// A matrix is read once for every 32 rows; for every 8 of those that do not lie at multiples of 16 bytes.
template <typename T>
void run_groups(const Int8Linear& p) {
  if ((reinterpret_cast<uintptr_t>(p.rows) | static_cast<uintptr_t>(p.row_stride) * sizeof(T)) % 16 != 0)
    return run<T, 1, false>(p);
  if (p.M <= 8) return run<T, 1, true>(p);
  if (p.M <= 16) return run<T, 2, true>(p);
  run<T, 4, true>(p);
}

void check(const Int8Linear& p) {
  if (p.C < 16 || p.C % 16 != 0 || reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) {
    throw std::invalid_argument(
        "int8_linear: C must be a multiple of 16 and weight start at a multiple of 16 bytes, got C=" +
        std::to_string(p.C) + " and a start " + std::to_string(reinterpret_cast<uintptr_t>(p.weight) % 16) +
        " bytes behind one");
  }
}

}  // namespace

void int8_linear(const Int8Linear& p) {
  check(p);
  if (p.M == 0 || p.N == 0) return;
  switch (p.dtype) {
    case DType::f32: return run<float, 1, false>(p);
    case DType::f16: return run_groups<vs::Half>(p);
    case DType::bf16: return run_groups<vs::BFloat16>(p);
  }
}

}  // namespace vispec::cuda
