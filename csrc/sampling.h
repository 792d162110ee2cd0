// The random numbers and the weights of a draw, the same bit for bit on every backend.
//
// A draw walks a cumulative sum of weights, and a cumulative sum of floating-point numbers depends on the
// order of its additions. Here a weight is an integer, so that any order, any split over threads or blocks,
// and any vector width give the same sum and therefore the same token. The exponential behind a weight uses
// single IEEE operations only: no fused multiply-add (compile with -ffp-contract=off; the intrinsics below on
// a GPU) and no library function, so no two machines can differ in it. vispec/ops/accept.py spells the same
// steps in PyTorch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VISPEC_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Static, because csrc/cpu compiles this header at several instruction-set levels and a merged out-of-line
// copy could carry instructions that the machine lacks.
#define VISPEC_HOST_DEVICE static inline
#endif

namespace vispec {

// First counter word of the draws of verification. Noise for any other purpose must use another tag: a draft
// that shared numbers with the verification of its own tokens would break the law.
constexpr uint32_t kAcceptStream = 0x56695370u;

// A weight is exp(score - best) in units of 2^-44; the sum over a vocabulary below 2^19 fits into 63 bits.
constexpr int kWeightBits = 44;
constexpr int64_t kMaxVocabulary = (int64_t{1} << 19) - 1;

struct Philox4 {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
VISPEC_HOST_DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    const Philox4 next = {
        {static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    counter = next;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 48-bit uniform number in [0, 1) of the absolute position length + depth: all of the first word above half
// of the second. The sum wraps: a stale length may be anything.
VISPEC_HOST_DEVICE double draw_uniform(int64_t seed, int64_t length, int64_t depth) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t place = static_cast<uint64_t>(length) + static_cast<uint64_t>(depth);
  const Philox4 counter = {
      {kAcceptStream, 0u, static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32)}};
  const Philox4 bits = philox4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  const uint64_t integer = (static_cast<uint64_t>(bits.word[0]) << 16) | (bits.word[1] >> 16);
  return static_cast<double>(integer) * 0x1p-48;
}

#if defined(__CUDA_ARCH__)
#define VISPEC_ADD(a, b) __fadd_rn(a, b)
#define VISPEC_SUB(a, b) __fsub_rn(a, b)
#define VISPEC_MUL(a, b) __fmul_rn(a, b)
#else
#define VISPEC_ADD(a, b) ((a) + (b))
#define VISPEC_SUB(a, b) ((a) - (b))
#define VISPEC_MUL(a, b) ((a) * (b))
#endif

// Weight of a token whose score lies `distance` (<= 0) above the best: round(exp(distance) * 2^44), half to
// even. Below about -31 it is 0, which makes a token impossible. The best token weighs exactly 2^44.
VISPEC_HOST_DEVICE int64_t token_weight(float distance) {
  const float x = distance > -40.0f ? distance : -40.0f;
  // Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even, with two additions.
  const float shifted = VISPEC_ADD(VISPEC_MUL(x, 1.44269504088896341f), 12582912.0f);
  const float n = VISPEC_SUB(shifted, 12582912.0f);
  // log(2) in two parts; n * 0.693359375 is exact.
  const float r = VISPEC_SUB(VISPEC_SUB(x, VISPEC_MUL(n, 0.693359375f)), VISPEC_MUL(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = VISPEC_ADD(VISPEC_MUL(p, r), 1.3981999507e-3f);
  p = VISPEC_ADD(VISPEC_MUL(p, r), 8.3334519073e-3f);
  p = VISPEC_ADD(VISPEC_MUL(p, r), 4.1665795894e-2f);
  p = VISPEC_ADD(VISPEC_MUL(p, r), 1.6666665459e-1f);
  p = VISPEC_ADD(VISPEC_MUL(p, r), 5.0000001201e-1f);
  p = VISPEC_ADD(VISPEC_ADD(VISPEC_MUL(p, VISPEC_MUL(r, r)), r), 1.0f);
  // p * 2^(n + 44) is exact in double; adding 2^52 rounds it to an integer, which then is the mantissa.
  const uint64_t exponent = static_cast<uint64_t>(static_cast<int32_t>(n) + kWeightBits + 1023) << 52;
  double scale, rounded;
  memcpy(&scale, &exponent, sizeof(scale));
  rounded = static_cast<double>(p) * scale + 0x1p52;
  uint64_t bits;
  memcpy(&bits, &rounded, sizeof(bits));
  return static_cast<int64_t>(bits & ((uint64_t{1} << 52) - 1));
}

}  // namespace vispec
