// Every wrapper of csrc/rt.h against plain arithmetic on the host.
#include <cmath>
#include <limits>

#include "harness.h"

using test::Buffer;
using test::run;

namespace {

VS_KERNEL void places(unsigned* out) {
  const vs::Dim3 block = vs::block_index(), grid = vs::grid_size();
  const unsigned index = (block.z * grid.y + block.y) * grid.x + block.x;
  unsigned* mine = out + (index * vs::thread_count() + vs::thread_index()) * 4;
  mine[0] = vs::thread_index();
  mine[1] = vs::lane_index();
  mine[2] = vs::warp_index();
  mine[3] = vs::warp_count() * 1000 + index;
}

void test_places() {
  Buffer<unsigned> out(3 * 2 * 2 * 96 * 4, 77);
  run(places, {3, 2, 2}, 96, 0, out.get());
  for (unsigned block = 0; block < 12; ++block) {
    for (unsigned t = 0; t < 96; ++t) {
      const unsigned* mine = out.get() + (block * 96 + t) * 4;
      EXPECT(mine[0] == t && mine[1] == t % 32 && mine[2] == t / 32 && mine[3] == 3000 + block, t);
    }
  }
}

VS_KERNEL void barriers(int* out, int* aligned) {
  vs::Shared shared;
  char* odd = shared.array<char>(3);
  int* a = shared.array<int>(128);
  double* b = shared.array<double>(128);
  const int t = static_cast<int>(vs::thread_index());
  for (int round = 0; round < 3; ++round) {
    a[t] = t + round;
    b[t] = 2 * t;
    vs::sync_block();
    out[round * 128 + t] = a[127 - t] + static_cast<int>(b[127 - t]);
    vs::sync_block();
  }
  const bool good = vs::aligned<vs::Word16>(odd) && vs::aligned<vs::Word16>(a) && vs::aligned<vs::Word16>(b);
  a[t ^ 5] = t;  // within a warp
  vs::sync_warp();
  aligned[t] = good && a[t] == (t ^ 5);
}

void test_barriers() {
  Buffer<int> out(3 * 128), aligned(128);
  const size_t bytes = vs::shared_bytes<char>(3) + vs::shared_bytes<int>(128) + vs::shared_bytes<double>(128);
  run(barriers, {1, 1, 1}, 128, bytes, out.get(), aligned.get());
  for (int round = 0; round < 3; ++round) {
    for (int t = 0; t < 128; ++t) EXPECT(out[round * 128 + t] == 3 * (127 - t) + round, t);
  }
  for (int t = 0; t < 128; ++t) EXPECT(aligned[t] == 1, t);
}

template <typename T>
VS_KERNEL void shuffles(T* out) {
  const unsigned lane = vs::lane_index(), n = vs::thread_count(), t = vs::thread_index();
  const T mine = static_cast<T>(t * 3 + 1);
  out[t] = vs::shuffle(mine, (lane * 7 + 3) % 32);
  out[n + t] = vs::shuffle_xor(mine, 9u);
  out[2 * n + t] = vs::shuffle_up(mine, 5u);
  out[3 * n + t] = vs::shuffle_down(mine, 5u);
  out[4 * n + t] = vs::warp_max(static_cast<T>((t * 37) % 101));
  out[5 * n + t] = vs::warp_sum(mine);
  out[6 * n + t] = vs::warp_prefix_sum(mine);
}

template <typename T>
void test_shuffles() {
  Buffer<T> out(7 * 64);
  run(shuffles<T>, {1, 1, 1}, 64, 0, out.get());
  for (unsigned t = 0; t < 64; ++t) {
    const unsigned lane = t % 32, first = t - lane;
    const auto value = [](unsigned thread) { return static_cast<T>(thread * 3 + 1); };
    T best = 0, sum = 0, prefix = 0;
    for (unsigned i = first; i < first + 32; ++i) {
      best = static_cast<T>(i * 37 % 101) > best ? static_cast<T>(i * 37 % 101) : best;
      sum += value(i);
      if (i <= t) prefix += value(i);
    }
    EXPECT(out[t] == value(first + (lane * 7 + 3) % 32), t);
    EXPECT(out[64 + t] == value(t ^ 9), t);
    EXPECT(out[128 + t] == value(lane < 5 ? t : t - 5), t);
    EXPECT(out[192 + t] == value(lane + 5 > 31 ? t : t + 5), t);
    EXPECT(out[256 + t] == best, t);
    EXPECT(out[320 + t] == sum, t);
    EXPECT(out[384 + t] == prefix, t);
  }
}

VS_KERNEL void votes(uint32_t* out) {
  const unsigned t = vs::thread_index(), lane = vs::lane_index();
  out[t] = vs::ballot(lane % 3 == 0);
  out[64 + t] = (vs::any(lane == 31) ? 1 : 0) + (vs::any(lane == 32) ? 2 : 0) + (vs::all(lane < 32) ? 4 : 0) +
                (vs::all(lane < 31) ? 8 : 0);
}

void test_votes() {
  Buffer<uint32_t> out(128);
  run(votes, {1, 1, 1}, 64, 0, out.get());
  for (unsigned t = 0; t < 64; ++t) {
    EXPECT(out[t] == 0x49249249u, t);
    EXPECT(out[64 + t] == 5, t);
  }
}

template <typename T>
VS_KERNEL void atomics(T* out, uint32_t* seen) {
  const unsigned t = vs::block_index().x * vs::thread_count() + vs::thread_index();
  const T before = vs::atomic_add(&out[0], T{1});
  vs::atomic_or(&seen[static_cast<uint32_t>(before) / 32], 1u << (static_cast<uint32_t>(before) % 32));
  vs::atomic_max(&out[1], static_cast<T>(t * 7 % 255));
  vs::atomic_or(&out[2], static_cast<T>(T{1} << (t % 31)));
  if (vs::atomic_cas(&out[3], T{0}, static_cast<T>(t + 1)) == T{0}) out[4] = static_cast<T>(t + 1);
}

template <typename T>
void test_atomics() {
  Buffer<T> out(5);
  Buffer<uint32_t> seen(8);
  run(atomics<T>, {4, 1, 1}, 64, 0, out.get(), seen.get());
  for (int i = 0; i < 8; ++i) EXPECT(seen[i] == 0xFFFFFFFFu, i);  // each old value was returned once
  EXPECT(out[0] == 256, 0);
  EXPECT(out[1] == 254, 0);
  EXPECT(out[2] == 0x7FFFFFFF, 0);
  EXPECT(out[3] != 0 && out[3] == out[4], 0);
}

VS_KERNEL void shared_sums(uint64_t* out) {
  vs::Shared shared;
  uint64_t* sums = shared.array<uint64_t>(3);
  const unsigned t = vs::thread_index();
  if (t < 3) sums[t] = t;
  vs::sync_block();
  vs::shared_add(&sums[t % 2], uint64_t{0xC0000001u} * (t + 1));  // carries out of the lower half
  vs::shared_add(&sums[2], uint64_t{1} << 61);                    // and out of the upper one
  vs::sync_block();
  if (t < 3) out[t] = sums[t];
}

void test_shared_sums() {
  Buffer<uint64_t> out(3);
  run(shared_sums, {1, 1, 1}, 128, vs::shared_bytes<uint64_t>(3), out.get());
  EXPECT(out[0] == uint64_t{0xC0000001u} * 4096, 0);
  EXPECT(out[1] == uint64_t{0xC0000001u} * 4160 + 1, 1);
  EXPECT(out[2] == 2, 2);
}

VS_KERNEL void arrivals(uint32_t* counter, int* parts, int* sum) {
  vs::Shared shared;
  int* last = shared.array<int>(1);
  const unsigned t = vs::thread_index(), block = vs::block_index().x;
  parts[block * 32 + t] = static_cast<int>(block + t);
  vs::sync_block();
  if (t == 0) *last = vs::arrive_last(counter, vs::grid_size().x) ? 1 : 0;
  vs::sync_block();
  if (*last == 0) return;
  int mine = 0;
  for (unsigned b = 0; b < vs::grid_size().x; ++b) mine += parts[b * 32 + t];
  mine = vs::warp_sum(mine);
  if (t == 0) *sum += mine;
}

void test_arrivals() {
  Buffer<uint32_t> counter(1);
  Buffer<int> parts(9 * 32), sum(1);
  for (int round = 1; round <= 3; ++round) {
    run(arrivals, {9, 1, 1}, 32, vs::shared_bytes<int>(1), counter.get(), parts.get(), sum.get());
    EXPECT(counter[0] == 0, round);  // ready for the next launch
    EXPECT(sum[0] == round * (32 * 36 + 9 * 496), round);
  }
}

VS_KERNEL void vectors(const uint32_t* in, uint32_t* out) {
  const unsigned t = vs::thread_index();
  const vs::Word16 a = vs::load<vs::Word16>(in + 4 * t), b = vs::load_readonly(in + 4 * t);
  const vs::Word16 c = vs::load_streaming(in + 4 * t);
  vs::Word16 sum;
  for (int i = 0; i < 4; ++i) sum.v[i] = a.v[i] + b.v[i] + c.v[i];
  vs::store<vs::Word16>(out + 4 * t, sum);
  const vs::Word8 half = vs::load<vs::Word8>(in + 4 * t + 2);
  vs::store<vs::Word8>(out + 128 + 2 * t, half);
  vs::store<uint16_t>(reinterpret_cast<uint16_t*>(out + 192) + t, vs::load<uint16_t>(in + 4 * t));
}

void test_vectors() {
  Buffer<uint32_t> in(128), out(192 + 16);
  for (unsigned i = 0; i < 128; ++i) in[i] = i * 1000 + 1;
  run(vectors, {1, 1, 1}, 32, 0, in.get(), out.get());
  for (unsigned i = 0; i < 128; ++i) EXPECT(out[i] == 3 * in[i], i);
  for (unsigned t = 0; t < 32; ++t) {
    EXPECT(out[128 + 2 * t] == in[4 * t + 2] && out[129 + 2 * t] == in[4 * t + 3], t);
    EXPECT((out[192 + t / 2] >> (t % 2 * 16) & 0xFFFF) == (in[4 * t] & 0xFFFF), t);
  }
}

VS_KERNEL void widen(float* half, float* bfloat) {
  const unsigned i = vs::block_index().x * vs::thread_count() + vs::thread_index();
  half[i] = vs::to_float(vs::Half{static_cast<uint16_t>(i)});
  bfloat[i] = vs::to_float(vs::BFloat16{static_cast<uint16_t>(i)});
}

VS_KERNEL void narrow(const float* in, uint16_t* half, uint16_t* bfloat, int count) {
  const int i = static_cast<int>(vs::block_index().x * vs::thread_count() + vs::thread_index());
  if (i >= count) return;
  half[i] = vs::from_float<vs::Half>(in[i]).bits;
  bfloat[i] = vs::from_float<vs::BFloat16>(in[i]).bits;
}

// The value of a 16-bit float, from its definition.
double value_of(unsigned bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(bits) & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

void test_conversions() {
  Buffer<float> half(65536), bfloat(65536);
  run(widen, {256, 1, 1}, 256, 0, half.get(), bfloat.get());
  for (unsigned i = 0; i < 65536; ++i) {
    const double h = value_of(i, 5, 10), b = value_of(i, 8, 7);
    EXPECT(std::isnan(h) ? std::isnan(half[i]) : half[i] == h && std::signbit(half[i]) == std::signbit(h), i);
    EXPECT(std::isnan(b) ? std::isnan(bfloat[i]) : bfloat[i] == b, i);
  }
  // Back: every value itself, and the points between a value and its neighbour, which round to the nearest,
  // even.
  for (int kind = 0; kind < 2; ++kind) {
    const int fraction = kind == 0 ? 10 : 7, top = kind == 0 ? 0x7C00 : 0x7F80;
    Buffer<float> in(4 * static_cast<size_t>(top));
    Buffer<uint16_t> out_half(in.size()), out_bfloat(in.size());
    for (int i = 0; i < top; ++i) {
      const double low = value_of(static_cast<unsigned>(i), 15 - fraction, fraction);
      double high = value_of(static_cast<unsigned>(i + 1), 15 - fraction, fraction);
      if (std::isinf(high)) high = std::ldexp(1.0, kind == 0 ? 16 : 128);
      in[4 * i] = static_cast<float>(low);
      in[4 * i + 1] = static_cast<float>(low + (high - low) / 4);
      in[4 * i + 2] = static_cast<float>(low + (high - low) / 2);
      in[4 * i + 3] = static_cast<float>(-(low + (high - low) * 3 / 4));
    }
    const int count = static_cast<int>(in.size());
    run(narrow, {static_cast<unsigned>(count + 255) / 256, 1, 1}, 256, 0, in.get(), out_half.get(),
        out_bfloat.get(), count);
    Buffer<uint16_t>& out = kind == 0 ? out_half : out_bfloat;
    for (int i = 0; i < top; ++i) {
      if (kind == 1 && i < 2) continue;  // quarters of the smallest bfloat16s vanish in a float
      EXPECT(out[4 * i] == i && out[4 * i + 1] == i, i);
      EXPECT(out[4 * i + 2] == i + i % 2, i);
      EXPECT(out[4 * i + 3] == (0x8000 | (i + 1)), i);
    }
  }
}

// Differences of all numbers whose last places are alike, which are exact, and of others, which round.
template <typename T>
VS_KERNEL void differences(uint32_t* out, int fraction_bits) {
  const unsigned i = vs::block_index().x * vs::thread_count() + vs::thread_index();
  const unsigned exponent = i >> fraction_bits,
                 other = (exponent << fraction_bits) + (i * 7 & ((1u << fraction_bits) - 1));
  out[2 * i] = vs::subtract_pairs<T>(i | other << 16, other | i << 16);
  out[2 * i + 1] = vs::subtract_pairs<T>(i | 0x3C00u << 16, 0x3A55u | i << 16);
}

template <typename T>
void test_differences(int exponent_bits, int fraction_bits) {
  const unsigned count = ((1u << exponent_bits) - 1) << fraction_bits;  // finite, not negative
  Buffer<uint32_t> out(2 * count);
  run(differences<T>, {count / 128, 1, 1}, 128, 0, out.get(), fraction_bits);
  const auto value = [&](unsigned bits) { return value_of(bits & 0xFFFF, exponent_bits, fraction_bits); };
  for (unsigned i = 0; i < count; ++i) {
    const unsigned other = (i >> fraction_bits << fraction_bits) + (i * 7 & ((1u << fraction_bits) - 1));
    EXPECT(value(out[2 * i]) == value(i) - value(other), i);
    EXPECT(value(out[2 * i] >> 16) == value(other) - value(i), i);
    const auto rounded = [](double x) { return vs::from_float<T>(static_cast<float>(x)).bits; };
    EXPECT((out[2 * i + 1] & 0xFFFF) == rounded(value(i) - value(0x3A55)), i);
    EXPECT(out[2 * i + 1] >> 16 == rounded(value(0x3C00) - value(i)), i);
  }
}

VS_KERNEL void arithmetic(uint64_t* wide, float* real) {
  wide[0] = static_cast<uint64_t>(vs::count_bits(0xF0F0A001u));
  wide[1] = static_cast<uint64_t>(vs::lowest_bit(0xA0000100u));
  wide[2] = vs::multiply_high(0xDEADBEEFu, 0xCAFEBABEu);
  wide[3] = vs::multiply_high(uint64_t{0x0123456789ABCDEF}, uint64_t{0xFEDCBA9876543210});
  wide[4] = vs::bit_cast<uint32_t>(vs::divide(1.0f, 3.0f));
  wide[5] = (vs::is_nan(vs::infinity()) ? 1u : 0u) + (vs::is_nan(vs::infinity() - vs::infinity()) ? 2u : 0u);
  const float near = 1.0f + 0x1p-12f;  // its square needs 25 bits: fused, the last one would be left
  wide[6] = vs::bit_cast<uint32_t>(vs::add(vs::multiply(near, near), -(1.0f + 0x1p-11f)));
  wide[7] = uint64_t{vs::byte_permute(0x33221100u, 0x77665544u, 0x7250u)} << 32 |
            vs::byte_permute(0x33221100u, 0x77665544u, 0x4316u);
  for (int i = 0; i < 300; ++i) real[i] = vs::exp2_fast(static_cast<float>(i - 280) * 0.37f);
  real[300] = vs::exp2_fast(-vs::infinity());
}

void test_arithmetic() {
  Buffer<uint64_t> wide(8);
  Buffer<float> real(301);
  run(arithmetic, {1, 1, 1}, 32, 0, wide.get(), real.get());
  EXPECT(wide[0] == 11, 0);
  EXPECT(wide[1] == 8, 0);
  EXPECT(wide[2] == (uint64_t{0xDEADBEEF} * 0xCAFEBABE) >> 32, 0);
  EXPECT(wide[3] == 0x0121FA00AD77D742ull, 0);
  EXPECT(wide[4] == 0x3EAAAAAB, 0);
  EXPECT(wide[5] == 2, 0);
  EXPECT(wide[6] == 0, 0);
  EXPECT(wide[7] == 0x7722550044331166ull, 0);
  for (int i = 0; i < 300; ++i) {
    const double truth = std::exp2(static_cast<double>(static_cast<float>(i - 280) * 0.37f));
    EXPECT(std::fabs(real[i] - truth) <= 4e-7 * truth, i);
  }
  EXPECT(real[300] == 0.0f, 0);
}

template <int kBytes>
VS_KERNEL void copies(const unsigned char* in, unsigned char* out, const int* sizes) {
  vs::Shared shared;
  unsigned char* first = shared.array<unsigned char>(32 * kBytes);
  unsigned char* second = shared.array<unsigned char>(32 * kBytes);
  const unsigned t = vs::thread_index();
  vs::copy_async<kBytes>(first + t * kBytes, in + t * kBytes, sizes[t]);
  vs::copy_commit();
  vs::copy_async<kBytes>(second + t * kBytes, in + (32 + t) * kBytes, kBytes);
  vs::copy_commit();
  vs::copy_wait<1>();
  vs::sync_block();
  for (int i = 0; i < kBytes; ++i) out[t * kBytes + i] = first[(31 - t) * kBytes + i];
  vs::copy_wait<0>();
  vs::sync_block();
  for (int i = 0; i < kBytes; ++i) out[(32 + t) * kBytes + i] = second[(31 - t) * kBytes + i];
}

template <int kBytes>
void test_copies() {
  Buffer<unsigned char> in(64 * kBytes), out(64 * kBytes);
  Buffer<int> sizes(32);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(1 + i % 251);
  for (int t = 0; t < 32; ++t) sizes[t] = t % 3 == 0 ? t % (kBytes + 1) : kBytes;
  run(copies<kBytes>, {1, 1, 1}, 32, 2 * vs::shared_bytes<unsigned char>(32 * kBytes), in.get(), out.get(),
      sizes.get());
  for (int t = 0; t < 64; ++t) {
    const int source = t < 32 ? 31 - t : 95 - t;
    const int size = t < 32 ? sizes[source] : kBytes;
    for (int i = 0; i < kBytes; ++i) {
      EXPECT(out[t * kBytes + i] == (i < size ? in[source * kBytes + i] : 0), t * kBytes + i);
    }
  }
}

template <int kMatrices, bool kTransposed>
VS_KERNEL void matrices(uint32_t* out) {
  vs::Shared shared;
  uint16_t* tile = shared.array<uint16_t>(32 * 24);  // rows of 48 bytes
  for (unsigned i = vs::thread_index(); i < 32 * 24; i += 32) tile[i] = static_cast<uint16_t>(i);
  vs::sync_block();
  uint32_t got[kMatrices];
  vs::load_matrix<kMatrices, kTransposed>(got, tile + vs::lane_index() * 24 + 8);
  for (int m = 0; m < kMatrices; ++m) out[vs::lane_index() * kMatrices + m] = got[m];
}

template <int kMatrices, bool kTransposed>
void test_matrices() {
  Buffer<uint32_t> out(32 * kMatrices);
  run(matrices<kMatrices, kTransposed>, {1, 1, 1}, 32, vs::shared_bytes<uint16_t>(32 * 24), out.get());
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < kMatrices; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int a = lane / 4, b = lane % 4 * 2 + half;
        const int row = 8 * m + (kTransposed ? b : a), column = 8 + (kTransposed ? a : b);
        EXPECT(
            (out[lane * kMatrices + m] >> (16 * half) & 0xFFFF) == static_cast<uint32_t>(row * 24 + column),
            lane);
      }
    }
  }
}

template <typename T>
VS_KERNEL void products(const T* a, const T* b, float* d) {
  const unsigned lane = vs::lane_index(), g = lane / 4, t = lane % 4;
  const auto pair = [](const T* p, unsigned step) {
    return uint32_t{p[0].bits} | uint32_t{p[step].bits} << 16;
  };
  uint32_t left[4], right[2];
  for (unsigned i = 0; i < 4; ++i) left[i] = pair(a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 1);
  for (unsigned i = 0; i < 2; ++i) right[i] = pair(b + (2 * t + i * 8) * 8 + g, 8);
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  vs::mma<T>(sums, left, right);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <typename T>
void test_products(int exponent_bits, int fraction_bits) {
  Buffer<T> a(16 * 16), b(16 * 8);
  Buffer<float> d(16 * 8);
  unsigned state = 12345;
  const auto next = [&] { return state = state * 1664525u + 1013904223u; };
  const auto fill = [&](T& x) {  // of either sign, magnitudes from 1/4 to 4
    const unsigned bias = (1u << (exponent_bits - 1)) - 1;
    x.bits =
        static_cast<uint16_t>((next() >> 16 & 0x8000) | (bias - 2 + (next() >> 20) % 4) << fraction_bits |
                              (next() >> 8 & ((1u << fraction_bits) - 1)));
  };
  for (size_t i = 0; i < a.size(); ++i) fill(a[i]);
  for (size_t i = 0; i < b.size(); ++i) fill(b[i]);
  double truth[16 * 8];
  for (int i = 0; i < 16 * 8; ++i) truth[i] = d[i] = static_cast<float>(i - 50) * 0.125f;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < 16; ++k) {
        truth[m * 8 + n] += value_of(a[m * 16 + k].bits, exponent_bits, fraction_bits) *
                            value_of(b[k * 8 + n].bits, exponent_bits, fraction_bits);
      }
    }
  }
  run(products<T>, {1, 1, 1}, 32, 0, a.get(), b.get(), d.get());
  for (int i = 0; i < 16 * 8; ++i) EXPECT(std::fabs(d[i] - truth[i]) < 2e-4, i);
}

}  // namespace

int main() {
  test_places();
  test_barriers();
  test_shuffles<int>();
  test_shuffles<float>();
  test_shuffles<uint64_t>();
  test_shuffles<double>();
  test_votes();
  test_atomics<int32_t>();
  test_atomics<uint32_t>();
  test_atomics<uint64_t>();
  test_shared_sums();
  test_arrivals();
  test_vectors();
  test_conversions();
  test_differences<vs::BFloat16>(8, 7);
  test_differences<vs::Half>(5, 10);
  test_arithmetic();
  test_copies<4>();
  test_copies<8>();
  test_copies<16>();
  test_matrices<1, false>();
  test_matrices<1, true>();
  test_matrices<2, false>();
  test_matrices<2, true>();
  test_matrices<4, false>();
  test_matrices<4, true>();
  test_products<vs::BFloat16>(8, 7);
  test_products<vs::Half>(5, 10);
  std::printf("%d failures\n", test::failures);
  return test::failures == 0 ? 0 : 1;
}
