// What kernels may use of the machine: the one file with intrinsics and inline PTX.
//
// The same kernel source compiles here under nvcc for a GPU, and under g++ (VISPEC_EMULATED) for the emulator
// in csrc/emu, which checks what a GPU leaves undefined. Rules for kernels: launch through vs::launch; shared
// memory through vs::Shared only; every thread reaches each block barrier; all 32 lanes reach each warp
// collective at the same line; no waiting on other blocks; nothing relies on lanes running in step. VS_AT and
// VS_AT_PASS carry the caller's source line to the emulator and vanish on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"

#if defined(VISPEC_EMULATED)
#include <cmath>
#define VS_KERNEL static
#define VS_DEVICE inline
#define VS_HOST_DEVICE inline
#define VS_BOUNDS(threads, blocks)
#define VS_UNROLL
#define VS_AT ::vs::emu::Site site = ::vs::emu::Site::here()
#define VS_AND_AT , VS_AT
#define VS_AT_PASS site
#define VS_AND_AT_PASS , site
#elif defined(__CUDACC__)
#define VS_KERNEL static __global__
#define VS_DEVICE __device__ __forceinline__
#define VS_HOST_DEVICE __host__ __device__ __forceinline__
#define VS_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define VS_UNROLL _Pragma("unroll")
#define VS_AT
#define VS_AND_AT
#define VS_AT_PASS
#define VS_AND_AT_PASS
#else
#error "rt.h needs nvcc, or g++ with VISPEC_EMULATED"
#endif

namespace vs {

constexpr unsigned kWarpSize = 32;

// Storage of the two 16-bit floats: bits only, so that kernels convert where they say so.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Units of vector access: as wide and as strictly aligned as they look.
struct alignas(16) Word16 {
  uint32_t v[4];
};
struct alignas(8) Word8 {
  uint32_t v[2];
};

// Calls f(word) with a word as wide as divides `together`: addresses, strides and sizes in bytes, or'ed.
template <typename F>
VS_DEVICE void with_widest_word(uintptr_t together, F&& f) {
  if (together % 16 == 0) return f(Word16{});
  if (together % 8 == 0) return f(Word8{});
  if (together % 4 == 0) return f(uint32_t{});
  if (together % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

// ---------------------------------------------------------------------------------- blocks and threads

#if defined(VISPEC_EMULATED)

VS_DEVICE unsigned thread_index() { return emu::thread_index(); }
VS_DEVICE unsigned thread_count() { return emu::thread_count(); }
VS_DEVICE Dim3 block_index() {
  const emu::Index3 i = emu::block_index();
  return {i.x, i.y, i.z};
}
VS_DEVICE Dim3 grid_size() {
  const emu::Index3 i = emu::grid_size();
  return {i.x, i.y, i.z};
}

#else

VS_DEVICE unsigned thread_index() { return threadIdx.x; }
VS_DEVICE unsigned thread_count() { return blockDim.x; }
VS_DEVICE Dim3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
VS_DEVICE Dim3 grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }

#endif

VS_DEVICE unsigned lane_index() { return thread_index() % kWarpSize; }
VS_DEVICE unsigned warp_index() { return thread_index() / kWarpSize; }
VS_DEVICE unsigned warp_count() { return thread_count() / kWarpSize; }

// ------------------------------------------------------------------------------------------ shared memory

// Carves the launch's dynamic shared memory into arrays, each aligned to 16 bytes; all threads of a block
// carve alike. `shared_bytes(count)` is what one array takes of the launch's total. Contents are undefined at
// first.
template <typename T>
constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

class Shared {
 public:
#if defined(VISPEC_EMULATED)
  template <typename T>
  T* array(size_t count VS_AND_AT) {
    return static_cast<T*>(emu::shared_array(ordinal_++, count * sizeof(T), site));
  }

 private:
  unsigned ordinal_ = 0;
#else
  template <typename T>
  VS_DEVICE T* array(size_t count) {
    extern __shared__ __align__(16) unsigned char vs_shared_memory[];
    T* start = reinterpret_cast<T*>(vs_shared_memory + offset_);
    offset_ += shared_bytes_of<T>(count);
    return start;
  }

 private:
  template <typename T>
  VS_DEVICE static unsigned shared_bytes_of(size_t count) {
    return static_cast<unsigned>((count * sizeof(T) + 15) / 16 * 16);
  }
  unsigned offset_ = 0;
#endif
};

// ---------------------------------------------------------------------------------- bits and conversions

template <typename To, typename From>
VS_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));  // becomes a register move
  return to;
}

VS_HOST_DEVICE float to_float(float x) { return x; }
VS_HOST_DEVICE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
VS_HOST_DEVICE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t{x.bits} & 0x8000u, rest = uint32_t{x.bits} & 0x7FFFu;
  if (rest >= 0x7C00u) return bit_cast<float>(sign << 16 | 0x7F800000u | (rest & 0x3FFu) << 13);
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;  // 2^112: the difference of the biases
  return sign != 0 ? -magnitude : magnitude;
#endif
}

// Round to nearest, ties to even.
template <typename T>
VS_HOST_DEVICE T from_float(float x);
template <>
VS_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
VS_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
template <>
VS_HOST_DEVICE Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7F800000u) return {0x7FFF};
  if (rest >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the last kept bit with the unit 2^-24
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13))};
#endif
}

VS_DEVICE int count_bits(uint32_t x) {
#if defined(VISPEC_EMULATED)
  return __builtin_popcount(x);
#else
  return __popc(x);
#endif
}

// Index of the lowest set bit; x must not be zero.
VS_DEVICE int lowest_bit(uint32_t x) {
#if defined(VISPEC_EMULATED)
  return __builtin_ctz(x);
#else
  return __ffs(static_cast<int>(x)) - 1;
#endif
}

// Four bytes of a and b: those that the selector's hexadecimal digits name, the lowest byte's last; 0 to 3
// are a's, 4 to 7 b's.
VS_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(VISPEC_EMULATED)
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 32; i += 8) bytes |= (both >> (selector >> i / 2 & 7u) * 8 & 0xFFu) << i;
  return bytes;
#else
  return __byte_perm(a, b, selector);
#endif
}

// The upper halves of the full products.
VS_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(VISPEC_EMULATED)
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#else
  return __umulhi(a, b);
#endif
}
VS_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(VISPEC_EMULATED)
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
#else
  return __umul64hi(a, b);
#endif
}

// ------------------------------------------------------------------------------------------------- maths

VS_DEVICE float infinity() { return bit_cast<float>(uint32_t{0x7F800000}); }

VS_DEVICE bool is_nan(float x) { return (bit_cast<uint32_t>(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// 2^x to about 2 units in the last place.
VS_DEVICE float exp2_fast(float x) {
#if defined(VISPEC_EMULATED)
  return ::exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Products and sums that the compiler must not fuse, because each is rounded on its own.
VS_DEVICE float multiply(float a, float b) {
#if defined(VISPEC_EMULATED)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}
VS_DEVICE float add(float a, float b) {
#if defined(VISPEC_EMULATED)
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

// a b + c, rounded once, where it must be one operation wherever the compiler unrolls it.
VS_DEVICE float fused(float a, float b, float c) {
#if defined(VISPEC_EMULATED)
  return ::fmaf(a, b, c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

VS_DEVICE float divide(float a, float b) {  // correctly rounded, whatever the compiler's flags
#if defined(VISPEC_EMULATED)
  return a / b;
#else
  return __fdiv_rn(a, b);
#endif
}

VS_DEVICE float square_root(float x) {  // correctly rounded likewise
#if defined(VISPEC_EMULATED)
  return ::sqrtf(x);
#else
  return __fsqrt_rn(x);
#endif
}

// a - b of two pairs of T (Half or BFloat16).
template <typename T>
VS_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b) {
#if defined(VISPEC_EMULATED)
  const auto part = [a, b](int shift) {
    const T x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    return uint32_t{from_float<T>(to_float(x) - to_float(y)).bits} << shift;
  };
  return part(0) | part(16);
#else
  uint32_t difference;
  if constexpr (std::is_same<T, BFloat16>::value) {
    // -1 times b, plus a: before sm_90 there is no subtraction.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xBF80BF80u), "r"(a));
  } else {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  }
  return difference;
#endif
}

// ------------------------------------------------------------------------------------------ vector access

template <typename Word>
VS_DEVICE bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Word) == 0;
}

template <typename Word>
VS_DEVICE Word load(const void* pointer VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  if (!aligned<Word>(pointer)) emu::fail_alignment(site, pointer, alignof(Word));
#endif
  return *static_cast<const Word*>(pointer);
}

template <typename Word>
VS_DEVICE void store(void* pointer, Word word VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  if (!aligned<Word>(pointer)) emu::fail_alignment(site, pointer, alignof(Word));
#endif
  *static_cast<Word*>(pointer) = word;
}

// Global memory that no thread of this launch writes; through the read-only path.
VS_DEVICE Word16 load_readonly(const void* pointer VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return load<Word16>(pointer, site);
#else
  Word16 w;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
      : "l"(pointer));
  return w;
#endif
}

// The same for what a launch reads once: it does not push what is read again out of the L1 cache.
VS_DEVICE Word16 load_streaming(const void* pointer VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return load<Word16>(pointer, site);
#else
  Word16 w;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
      : "l"(pointer));
  return w;
#endif
}

// ---------------------------------------------------------------------------------------------- barriers

VS_DEVICE void sync_block(VS_AT) {
#if defined(VISPEC_EMULATED)
  emu::sync_block(site);
#else
  __syncthreads();
#endif
}

VS_DEVICE void sync_warp(VS_AT) {
#if defined(VISPEC_EMULATED)
  emu::sync_warp(site);
#else
  __syncwarp();
#endif
}

// -------------------------------------------------------------------------------------- warp collectives

template <typename T>
VS_DEVICE T shuffle(T value, unsigned source_lane VS_AND_AT) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
#if defined(VISPEC_EMULATED)
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = emu::shuffle(bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#else
  return __shfl_sync(0xFFFFFFFFu, value, static_cast<int>(source_lane));
#endif
}

template <typename T>
VS_DEVICE T shuffle_xor(T value, unsigned mask VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return shuffle(value, lane_index() ^ mask, site);
#else
  return __shfl_xor_sync(0xFFFFFFFFu, value, static_cast<int>(mask));
#endif
}

// The value of the lane `delta` below; lanes under `delta` keep their own.
template <typename T>
VS_DEVICE T shuffle_up(T value, unsigned delta VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return shuffle(value, lane_index() < delta ? lane_index() : lane_index() - delta, site);
#else
  return __shfl_up_sync(0xFFFFFFFFu, value, delta);
#endif
}

// The value of the lane `delta` above; the last `delta` lanes keep their own.
template <typename T>
VS_DEVICE T shuffle_down(T value, unsigned delta VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return shuffle(value, lane_index() + delta >= kWarpSize ? lane_index() : lane_index() + delta, site);
#else
  return __shfl_down_sync(0xFFFFFFFFu, value, delta);
#endif
}

VS_DEVICE uint32_t ballot(bool vote VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  return emu::ballot(vote, site);
#else
  return __ballot_sync(0xFFFFFFFFu, vote);
#endif
}
VS_DEVICE bool any(bool vote VS_AND_AT) { return ballot(vote VS_AND_AT_PASS) != 0; }
VS_DEVICE bool all(bool vote VS_AND_AT) { return ballot(vote VS_AND_AT_PASS) == 0xFFFFFFFFu; }

template <typename T>
VS_DEVICE T warp_max(T value VS_AND_AT) {
  VS_UNROLL
  for (unsigned mask = 16; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask VS_AND_AT_PASS);
    value = other > value ? other : value;
  }
  return value;
}

// Added pairwise in a fixed order: every lane gets the same bits.
template <typename T>
VS_DEVICE T warp_sum(T value VS_AND_AT) {
  VS_UNROLL
  for (unsigned mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask VS_AND_AT_PASS);
  return value;
}

// Sum over this lane and those below it.
template <typename T>
VS_DEVICE T warp_prefix_sum(T value VS_AND_AT) {
  VS_UNROLL
  for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
    const T below = shuffle_up(value, delta VS_AND_AT_PASS);
    if (lane_index() >= delta) value += below;
  }
  return value;
}

// ----------------------------------------------------------------------------------------------- atomics

// Relaxed, as on the device; each returns the old value. T: int32_t, uint32_t or uint64_t.
#if defined(VISPEC_EMULATED)
template <typename T>
VS_DEVICE T atomic_add(T* p, T x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <typename T>
VS_DEVICE T atomic_max(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < x && !__atomic_compare_exchange_n(p, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <typename T>
VS_DEVICE T atomic_or(T* p, T x) {
  return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <typename T>
VS_DEVICE T atomic_cas(T* p, T expected, T desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
#else
// CUDA's 64-bit overloads take unsigned long long, which uint64_t is not on Linux.
template <typename T>
VS_DEVICE auto* atomic_pointer(T* p) {
  if constexpr (std::is_same<T, uint64_t>::value) {
    return reinterpret_cast<unsigned long long*>(p);
  } else {
    return p;
  }
}
template <typename T>
VS_DEVICE T atomic_add(T* p, T x) {
  return atomicAdd(atomic_pointer(p), x);
}
template <typename T>
VS_DEVICE T atomic_max(T* p, T x) {
  return atomicMax(atomic_pointer(p), x);
}
template <typename T>
VS_DEVICE T atomic_or(T* p, T x) {
  return atomicOr(atomic_pointer(p), x);
}
template <typename T>
VS_DEVICE T atomic_cas(T* p, T expected, T desired) {
  return atomicCAS(atomic_pointer(p), expected, desired);
}
#endif

// Adds 64 bits in shared memory, where the device has native additions of 32 bits alone and would spin on
// compare-and-swap. Both halves are right once a barrier has passed.
VS_DEVICE void shared_add(uint64_t* p, uint64_t x) {
  uint32_t* halves = reinterpret_cast<uint32_t*>(p);  // low first on every machine that we run on
  const uint32_t low = static_cast<uint32_t>(x), before = atomic_add(halves, low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (before + low < before ? 1u : 0u);
  if (high != 0) atomic_add(halves + 1, high);
}

// Last-arriver merges. One thread of a block calls this after a sync_block; of `total` calls on one counter
// the last returns true, sees all that the other callers' blocks wrote before, and finds the counter back at
// zero.
VS_DEVICE bool arrive_last(uint32_t* counter, uint32_t total VS_AND_AT) {
#if defined(VISPEC_EMULATED)
  const uint32_t before = __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
  if (before >= total) emu::fail(site, "the counter of arrivals did not start at zero");
  if (before + 1 != total) return false;
  __atomic_store_n(counter, 0u, __ATOMIC_RELAXED);
  return true;
#else
  __threadfence();
  const bool last = atomicInc(counter, total - 1) == total - 1;  // wraps to zero at the last arrival
  __threadfence();
  return last;
#endif
}

// ------------------------------------------------------------------------------------ asynchronous copies

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; bytes past `source_bytes` become zero. The
// destination holds NaN in the emulator until copy_wait has let the copy's group finish.
template <int kBytes>
VS_DEVICE void copy_async(void* shared, const void* global, int source_bytes VS_AND_AT) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
#if defined(VISPEC_EMULATED)
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0) emu::fail_alignment(site, shared, kBytes);
  if (reinterpret_cast<uintptr_t>(global) % kBytes != 0) emu::fail_alignment(site, global, kBytes);
  if (source_bytes < 0 || source_bytes > kBytes)
    emu::fail(site, "asynchronous copy of a negative or too large size");
  unsigned char* bytes = static_cast<unsigned char*>(shared);
  for (int i = 0; i < kBytes; ++i) bytes[i] = 0xFF;
  emu::queue_copy({shared, global, kBytes, static_cast<uint32_t>(source_bytes), 0}, site);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

VS_DEVICE void copy_commit() {
#if defined(VISPEC_EMULATED)
  emu::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most the last `kPending` committed groups of this thread are in flight; others' need a barrier
// too.
template <int kPending>
VS_DEVICE void copy_wait() {
#if defined(VISPEC_EMULATED)
  emu::AsyncCopy copy;
  while (emu::finish_copy(kPending, &copy)) {
    unsigned char* to = static_cast<unsigned char*>(copy.destination);
    const unsigned char* from = static_cast<const unsigned char*>(copy.source);
    for (uint32_t i = 0; i < copy.bytes; ++i) to[i] = i < copy.source_bytes ? from[i] : 0;
  }
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------ tensor cores

// Loads kMatrices (1, 2 or 4) 8x8 matrices of 16-bit elements; lane 8m + r gives the address of row r of
// matrix m in shared memory. Lane l gets of each matrix the elements [l/4][2(l%4)], [..+1], or of its
// transpose.
template <int kMatrices, bool kTransposed>
VS_DEVICE void load_matrix(uint32_t (&out)[kMatrices], const void* row VS_AND_AT) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "1, 2 or 4 matrices");
#if defined(VISPEC_EMULATED)
  Word16 mine{};
  if (lane_index() < 8 * kMatrices) mine = load<Word16>(row, site);
  emu::spread_matrix(out, mine.v, kMatrices, kTransposed, site);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// d += a b for one 16x8x16 product of T (Half or BFloat16) with float sums; fragments as PTX lays them out.
template <typename T>
VS_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] VS_AND_AT) {
  constexpr bool kBFloat16 = std::is_same<T, BFloat16>::value;
  static_assert(kBFloat16 || std::is_same<T, Half>::value, "Half or BFloat16");
#if defined(VISPEC_EMULATED)
  emu::mma_16x8x16(d, a, b, kBFloat16, site);
#else
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace vs
