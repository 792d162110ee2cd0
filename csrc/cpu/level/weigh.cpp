// The weights of a draw, compiled once for each instruction set like scan.cpp, but without fused
// multiply-add: they must not differ between machines (csrc/sampling.h).

#include <cstdint>

#include "cpu/rows.h"
#include "sampling.h"

namespace vispec::cpu::VISPEC_LEVEL {

int64_t weigh(const float* __restrict scores, int64_t V, float best, float lowest,
              int64_t* __restrict weights) {
  int64_t sum = 0;
  for (int64_t i = 0; i < V; ++i) {
    const int64_t weight = token_weight(scores[i] - best);
    const int64_t kept = scores[i] < lowest ? 0 : weight;
    weights[i] = kept;
    sum += kept;
  }
  return sum;
}

}  // namespace vispec::cpu::VISPEC_LEVEL
