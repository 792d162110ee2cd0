// Passes over a row of logits, compiled once for each instruction set. Fused multiply-add is allowed here: no
// draw depends on these sums.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/level/vectors.h"
#include "cpu/rows.h"

namespace vispec::cpu::VISPEC_LEVEL {
namespace {

// The lanes in order of columns; one after another, so that every instruction set adds alike.
VISPEC_INLINE float largest(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

VISPEC_INLINE bool any(Ints mask) {
  int32_t joined = 0;
  for (int i = 0; i < kLanes; ++i) joined |= mask[i];
  return joined != 0;
}

// The columns from `column`, those at or beyond `end` filled with -inf.
template <class Element>
VISPEC_INLINE Floats logits(const char* row, int64_t column, int64_t end) {
  return load<Element>(row + column * Element::bytes, end - column, -INFINITY);
}

// exp of x <= 0; 1.6e-38 below -87.
VISPEC_INLINE Floats falling(Floats x) {
  const Exponential e = exponential(x > -87.0f ? x : all(-87.0f));
  return floats_of(bits_of(e.power) + (Words(e.exponent) << 23));
}

VISPEC_INLINE void insert(RowPart* part, float value, int64_t column) {
  int64_t at = part->found < part->top_k ? part->found++ : part->top_k - 1;
  for (; at > 0 && value > part->best[at - 1]; --at) {
    part->best[at] = part->best[at - 1];
    part->columns[at] = part->columns[at - 1];
  }
  part->best[at] = value;
  part->columns[at] = column;
}

template <class Element>
void scan_row(const char* row, int64_t begin, int64_t end, RowPart* part) {
  alignas(64) Floats block[kBlock / kLanes];
  part->found = 0;
  part->max = -FLT_MAX;
  part->sum = 0;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
    const int groups = static_cast<int>((stop - start + kLanes - 1) / kLanes);
    Floats top = all(-INFINITY);
    for (int g = 0; g < groups; ++g) {
      Floats v = logits<Element>(row, start + g * kLanes, stop);
      v = v == v ? v : all(-INFINITY);
      v = v < FLT_MAX ? v : all(FLT_MAX);
      block[g] = v;
      top = v > top ? v : top;
    }
    const float block_max = largest(top);
    if (part->found < part->top_k || block_max > part->best[part->top_k - 1]) {
      for (int g = 0; g < groups; ++g) {
        const bool full = part->found == part->top_k;
        if (full && !any(block[g] > part->best[part->top_k - 1])) continue;
        const int64_t column = start + g * kLanes;
        for (int i = 0; i < kLanes && column + i < stop; ++i)
          if (part->found < part->top_k || block[g][i] > part->best[part->top_k - 1])
            insert(part, block[g][i], column + i);
      }
    }
    if (block_max > part->max) {
      part->sum *= exp(static_cast<double>(part->max) - static_cast<double>(block_max));
      part->max = block_max;
    }
    Floats sum = {};
    for (int g = 0; g < groups; ++g) sum += falling(block[g] - part->max);
    for (int i = 0; i < kLanes; ++i) part->sum += static_cast<double>(sum[i]);
  }
}

template <class Element>
int64_t argmax_row(const char* row, int64_t V) {
  float best = -INFINITY;
  int64_t best_block = -1;
  Ints unusable = {};
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t stop = start + kBlock < V ? start + kBlock : V;
    Floats top = all(-INFINITY);
    for (int64_t column = start; column < stop; column += kLanes) {
      const Floats v = logits<Element>(row, column, stop);
      unusable |= ~(v <= FLT_MAX);
      top = v > top ? v : top;
    }
    const float block_max = largest(top);
    if (block_max > best) {
      best = block_max;
      best_block = start;
    }
  }
  if (best_block < 0 || any(unusable)) return -1;
  for (int64_t column = best_block;; column += kLanes) {
    const Floats v = logits<Element>(row, column, V);
    for (int i = 0; i < kLanes; ++i)
      if (v[i] == best) return column + i;
  }
}

template <class Element>
bool scale_row(const char* row, int64_t V, float temperature, float* scores, float* block_max, float* best) {
  Ints unusable = {};
  *best = -INFINITY;
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t stop = start + kBlock < V ? start + kBlock : V;
    Floats top = all(-INFINITY);
    for (int64_t column = start; column < stop; column += kLanes) {
      const Floats v = logits<Element>(row, column, stop) / temperature;
      unusable |= ~(v <= FLT_MAX);
      top = v > top ? v : top;
      const int64_t lanes = stop - column < kLanes ? stop - column : kLanes;
      memcpy(scores + column, &v, static_cast<size_t>(lanes) * sizeof(float));
    }
    block_max[start / kBlock] = largest(top);
    if (block_max[start / kBlock] > *best) *best = block_max[start / kBlock];
  }
  return *best > -INFINITY && !any(unusable);
}

}  // namespace

void scan(const void* row, DType dtype, int64_t begin, int64_t end, RowPart* part) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) scan_row<Element>(bytes, begin, end, part)
  VISPEC_BY_DTYPE(dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

int64_t argmax(const void* row, DType dtype, int64_t V) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) argmax_row<Element>(bytes, V)
  VISPEC_BY_DTYPE(dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

bool scale(const void* row, DType dtype, int64_t V, float temperature, float* scores, float* block_max,
           float* best) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) scale_row<Element>(bytes, V, temperature, scores, block_max, best)
  VISPEC_BY_DTYPE(dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

}  // namespace vispec::cpu::VISPEC_LEVEL
