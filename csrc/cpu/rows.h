// Passes over one row in its own dtype, compiled for several instruction sets and chosen at run time.
#pragma once

#include <cstdint>

#include "ops.h"

namespace vispec::cpu {

constexpr int64_t kMaxTopK = 64;

// Columns per block: a block of float32 stays in the first-level cache, and only a block whose maximum beats
// the list's last entry is searched for entries.
constexpr int64_t kBlock = 512;

// What one stretch of a row contributes to its log-softmax and its best K.
struct RowPart {
  int64_t top_k;
  int64_t found;         // entries below, at most top_k
  float best[kMaxTopK];  // descending, ties by column
  int64_t columns[kMaxTopK];
  float max;   // at least -FLT_MAX
  double sum;  // of exp(value - max)
};

constexpr int64_t kMostLanes = 16;  // of a vector of float32

inline int64_t padded_to_lanes(int64_t count) { return (count + kMostLanes - 1) / kMostLanes * kMostLanes; }

// A node of path_attention and what it sees, in order.
struct PathNode {
  int64_t b, g, t;      // batch row, key-value head, node
  int64_t committed;    // slots before the tail, all seen
  const int64_t* tail;  // the slots of its ancestors and its own
  int64_t seen;         // committed and tail slots together
};

// One set of functions for each instruction set, all alike:
// scan: best K and sum of exponentials of columns [begin, end); NaN counts as -inf, +inf as FLT_MAX.
// argmax: lowest column of the maximum, -1 where the row holds NaN or +inf or nothing above -inf.
// scale: scores = float32 logits / temperature, the maximum of every kBlock of them, and the best; false
// where a
//     score is NaN or +inf, or none is above -inf.
// weigh: the weights of csrc/sampling.h, 0 for scores below `lowest`; returns their sum.
// norm, silu: one row of the op.
// turn: token t of batch row b, all its heads.
// attend: one node, all query heads of its key-value head; `scratch` holds their queries and sums
// (padded_to_lanes(head)
//     each), their weights (padded_to_lanes(seen)), and kMostLanes rows of padded_to_lanes(head).
#define VISPEC_DECLARE_LEVEL(level)                                                                       \
  namespace level {                                                                                       \
  void scan(const void* row, DType dtype, int64_t begin, int64_t end, RowPart* part);                     \
  int64_t argmax(const void* row, DType dtype, int64_t V);                                                \
  bool scale(const void* row, DType dtype, int64_t V, float temperature, float* scores, float* block_max, \
             float* best);                                                                                \
  int64_t weigh(const float* scores, int64_t V, float best, float lowest, int64_t* weights);              \
  void norm(const RmsNorm& op, int64_t row);                                                              \
  void silu(const SiluMul& op, int64_t row);                                                              \
  void turn(const RopeAppend& op, int64_t b, int64_t t);                                                  \
  void attend(const TreeAttention& op, const PathNode& node, float* scratch);                             \
  }
VISPEC_DECLARE_LEVEL(portable)
VISPEC_DECLARE_LEVEL(avx2)
VISPEC_DECLARE_LEVEL(avx512)
#undef VISPEC_DECLARE_LEVEL

struct RowFunctions {
  const char* name;
  decltype(&portable::scan) scan;
  decltype(&portable::argmax) argmax;
  decltype(&portable::scale) scale;
  decltype(&portable::weigh) weigh;
  decltype(&portable::norm) norm;
  decltype(&portable::silu) silu;
  decltype(&portable::turn) turn;
  decltype(&portable::attend) attend;
};

// The widest that this machine has.
const RowFunctions& rows();

inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline const void* row_at(const void* base, DType dtype, int64_t elements) {
  return static_cast<const char*>(base) + elements * element_bytes(dtype);
}

}  // namespace vispec::cpu
