// Passes over a row of logits, compiled once for each instruction set (see CMakeLists.txt) with VISPEC_LEVEL,
// the name of a namespace, and VISPEC_VECTOR_BYTES. Everything else is local to the file, and nothing here
// may call an inline library function: the linker keeps one copy of such a function for the whole program,
// and it could be the one with instructions that this machine lacks. Fused multiply-add is allowed here: no
// draw depends on these sums.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/rows.h"

namespace vispec::cpu::VISPEC_LEVEL {
namespace {

// Vectors of the compiler's own kind (g++ and clang, any architecture), as wide as a register: g++ 12 takes
// vectors wider than that apart, element by element.
constexpr int kLanes = VISPEC_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define VISPEC_INLINE static inline __attribute__((always_inline))

VISPEC_INLINE Floats all(float value) { return Floats{} + value; }

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

struct Float32 {
  static constexpr int bytes = 4;
  VISPEC_INLINE Floats load(const char* from) {
    Floats v;
    memcpy(&v, from, sizeof(v));
    return v;
  }
};

struct BFloat16 {
  static constexpr int bytes = 2;
  VISPEC_INLINE Floats load(const char* from) {
    Halves h;
    memcpy(&h, from, sizeof(h));
    const Words w = __builtin_convertvector(h, Words) << 16;
    Floats v;
    memcpy(&v, &w, sizeof(v));
    return v;
  }
};

struct Float16 {
  static constexpr int bytes = 2;
  // Exponent rebased by integer addition; a subnormal gets its leading bit from one exact float subtraction,
  // which also works where subnormal floats are flushed to zero.
  VISPEC_INLINE Floats load(const char* from) {
    Halves h;
    memcpy(&h, from, sizeof(h));
    const Words w = __builtin_convertvector(h, Words);
    const Words exponent = w & 0x7c00u;
    const Words rebased = ((w & 0x7fffu) << 13) + (112u << 23);
    const Words special = exponent == 0x7c00u ? rebased + (112u << 23) : rebased;
    const Words raised = rebased + (1u << 23);
    Floats subnormal, normal;
    memcpy(&subnormal, &raised, sizeof(raised));
    memcpy(&normal, &special, sizeof(special));
    const Floats magnitude = exponent == 0u ? subnormal - 0x1p-14f : normal;
    Words bits;
    memcpy(&bits, &magnitude, sizeof(bits));
    bits |= (w & 0x8000u) << 16;
    Floats v;
    memcpy(&v, &bits, sizeof(v));
    return v;
  }
};

// The columns from `column`, those at or beyond `end` filled with -inf.
template <class Element>
VISPEC_INLINE Floats load(const char* row, int64_t column, int64_t end) {
  if (column + kLanes <= end) return Element::load(row + column * Element::bytes);
  alignas(64) char copy[kLanes * 4] = {};
  memcpy(copy, row + column * Element::bytes, static_cast<size_t>((end - column) * Element::bytes));
  Floats v = Element::load(copy);
  for (int i = static_cast<int>(end - column); i < kLanes; ++i) v[i] = -INFINITY;
  return v;
}

// exp of x <= 0 to about one unit in the last place; 1.6e-38 below -87. The polynomial is that of
// token_weight.
VISPEC_INLINE Floats exponential(Floats distance) {
  const Floats x = distance > -87.0f ? distance : all(-87.0f);
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits;
  memcpy(&bits, &p, sizeof(bits));
  bits += __builtin_convertvector(n, Ints) << 23;
  memcpy(&p, &bits, sizeof(p));
  return p;
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
      Floats v = load<Element>(row, start + g * kLanes, stop);
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
    for (int g = 0; g < groups; ++g) sum += exponential(block[g] - part->max);
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
      const Floats v = load<Element>(row, column, stop);
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
    const Floats v = load<Element>(row, column, V);
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
      const Floats v = load<Element>(row, column, stop) / temperature;
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

#define VISPEC_BY_DTYPE(call)              \
  switch (dtype) {                         \
    case DType::f32: return call(Float32); \
    case DType::f16: return call(Float16); \
    case DType::bf16: break;               \
  }                                        \
  return call(BFloat16)

void scan(const void* row, DType dtype, int64_t begin, int64_t end, RowPart* part) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) scan_row<Element>(bytes, begin, end, part)
  VISPEC_BY_DTYPE(VISPEC_CALL);
#undef VISPEC_CALL
}

int64_t argmax(const void* row, DType dtype, int64_t V) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) argmax_row<Element>(bytes, V)
  VISPEC_BY_DTYPE(VISPEC_CALL);
#undef VISPEC_CALL
}

bool scale(const void* row, DType dtype, int64_t V, float temperature, float* scores, float* block_max,
           float* best) {
  const char* bytes = static_cast<const char*>(row);
#define VISPEC_CALL(Element) scale_row<Element>(bytes, V, temperature, scores, block_max, best)
  VISPEC_BY_DTYPE(VISPEC_CALL);
#undef VISPEC_CALL
}

}  // namespace vispec::cpu::VISPEC_LEVEL
