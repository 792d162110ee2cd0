// Vectors of float32 for the files of this folder, which are compiled once for each instruction set with
// VISPEC_LEVEL, the name of a namespace, and VISPEC_VECTOR_BYTES (see CMakeLists.txt). Everything is local to
// the file that includes this, and nothing may call an inline library function: the linker keeps one copy of
// such a function for the whole program, and it could be the one with instructions that this machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#define VISPEC_INLINE static inline __attribute__((always_inline))

namespace vispec::cpu::VISPEC_LEVEL {
namespace {

// Vectors of the compiler's own kind (g++ and clang, any architecture), as wide as a register: g++ 12 takes
// vectors wider than that apart, element by element.
constexpr int kLanes = VISPEC_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

VISPEC_INLINE Floats all(float value) { return Floats{} + value; }

VISPEC_INLINE Words bits_of(Floats v) {
  Words w;
  memcpy(&w, &v, sizeof(w));
  return w;
}

VISPEC_INLINE Floats floats_of(Words w) {
  Floats v;
  memcpy(&v, &w, sizeof(v));
  return v;
}

// How elements of each dtype lie in memory: `Packed` is a vector of them. `pack` rounds to nearest, ties to
// even, as PyTorch does; every NaN becomes the quiet one.
struct Float32 {
  static constexpr int bytes = 4;
  typedef Floats Packed;
  VISPEC_INLINE Floats unpack(Packed v) { return v; }
  VISPEC_INLINE Packed pack(Floats v) { return v; }
};

struct BFloat16 {
  static constexpr int bytes = 2;
  typedef Halves Packed;
  VISPEC_INLINE Floats unpack(Packed h) { return floats_of(__builtin_convertvector(h, Words) << 16); }
  VISPEC_INLINE Packed pack(Floats v) {
    const Words w = bits_of(v);
    const Words nearest = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v == v ? nearest : Words{} + 0x7fc0u, Halves);
  }
};

struct Float16 {
  static constexpr int bytes = 2;
  typedef Halves Packed;
  // Exponent rebased by integer addition; a subnormal gets its leading bit from one exact float subtraction,
  // which also works where subnormal floats are flushed to zero.
  VISPEC_INLINE Floats unpack(Packed h) {
    const Words w = __builtin_convertvector(h, Words);
    const Words exponent = w & 0x7c00u;
    const Words rebased = ((w & 0x7fffu) << 13) + (112u << 23);
    const Floats subnormal = floats_of(rebased + (1u << 23)) - 0x1p-14f;
    const Floats normal = floats_of(exponent == 0x7c00u ? rebased + (112u << 23) : rebased);
    const Floats magnitude = exponent == 0u ? subnormal : normal;
    return floats_of(bits_of(magnitude) | (w & 0x8000u) << 16);
  }
  // The way back; a subnormal is rounded by one float addition, whose unit in the last place is its own.
  VISPEC_INLINE Packed pack(Floats v) {
    const Words w = bits_of(v), magnitude = w & 0x7fffffffu;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words subnormal = bits_of(floats_of(magnitude) + 0.5f) - 0x3f000000u;
    Words half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((w >> 16) & 0x8000u), Halves);
  }
};

// A vector from `from`, of which `count` elements are there; the others are `absent`.
template <class Element>
VISPEC_INLINE Floats load(const char* from, int64_t count, float absent = 0.0f) {
  typename Element::Packed packed = {};
  if (count >= kLanes) {
    memcpy(&packed, from, sizeof(packed));
    return Element::unpack(packed);
  }
  memcpy(&packed, from, static_cast<size_t>(count * Element::bytes));
  Floats v = Element::unpack(packed);
  for (int i = static_cast<int>(count); i < kLanes; ++i) v[i] = absent;
  return v;
}

template <class Element>
VISPEC_INLINE void store(char* to, int64_t count, Floats v) {
  const typename Element::Packed packed = Element::pack(v);
  memcpy(to, &packed, count >= kLanes ? sizeof(packed) : static_cast<size_t>(count * Element::bytes));
}

template <class Element>
VISPEC_INLINE Floats rounded(Floats v) {
  return Element::unpack(Element::pack(v));
}

// Lanes 2i and 2i + 1 of a and b added; those of a come first.
VISPEC_INLINE Floats pairs(Floats a, Floats b) {
#if VISPEC_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif VISPEC_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The sum of the lanes of each of kLanes vectors, in order of the vectors. Overwrites them.
VISPEC_INLINE Floats lane_sums(Floats* vectors) {
  for (int count = kLanes; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) vectors[i] = pairs(vectors[2 * i], vectors[2 * i + 1]);
  return vectors[0];
}

// exp(x) = power * 2^exponent to about one unit in the last place, for x from -87 to 89. The polynomial is
// that of token_weight.
struct Exponential {
  Floats power;
  Ints exponent;
};

VISPEC_INLINE Exponential exponential(Floats x) {
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r + 1.0f, __builtin_convertvector(n, Ints)};
}

}  // namespace

// call(Element) for the element of a dtype.
#define VISPEC_BY_DTYPE(dtype, call)       \
  switch (dtype) {                         \
    case DType::f32: return call(Float32); \
    case DType::f16: return call(Float16); \
    case DType::bf16: break;               \
  }                                        \
  return call(BFloat16)

}  // namespace vispec::cpu::VISPEC_LEVEL
