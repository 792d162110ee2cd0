// Kernel body of int8_linear: a few rows times a matrix of int8, which is read once.
//
// What counts is that enough of the matrix is on its way. A block has 32 of its rows, here called outputs;
// the 8 warps divide the columns into runs, and their sums meet in shared memory, always in the same order.
// In the products of the tensor cores the outputs are the 16 rows and the given rows the 8 columns: as many
// as a level of a draft tree has. Columns may be taken in any order, as long as both sides take the same one:
// a lane reads 16 in a row of an output, and the same 16 of a given row, and has its part of four products.
// So the matrix goes from memory straight to registers, 16 bytes a lane and load, and the loads of the next
// steps are issued before a step is computed.
//
// The given rows are read through the L1 cache: all blocks of an SM share what is in it, and none waits for a
// copy in shared memory before it starts. A block's own copy would add half as many bytes as the block has of
// the matrix for every 8 rows. The matrix passes the L1 cache by.
#pragma once

#include <type_traits>

#include "ops.h"
#include "vectors.cuh"

namespace vispec::kernels {

constexpr unsigned kInt8Threads = 256;
constexpr int kInt8Warps = kInt8Threads / vs::kWarpSize;
constexpr int kInt8Tiles = 2;  // of 16 outputs
constexpr int kInt8Outputs = 16 * kInt8Tiles;
constexpr int kInt8Columns = 64;              // of a step: 16 for each of the four lanes that share an output
constexpr int kInt8Pitch = kInt8Outputs + 4;  // a warp then stores its sums to 32 banks

// Steps whose weights a lane has on their way, as registers allow.
template <typename T, int kGroups>
constexpr int kInt8Steps = sizeof(T) == 4 ? 1
                           : kGroups > 2  ? 2
                                          : 3;

// Sums of a warp in shared memory.
template <int kGroups>
constexpr int kInt8Part = 8 * kGroups * kInt8Pitch;

// Four int8, the lowest byte first, as two pairs of T; exact. On most GPUs conversions of integers come at a
// quarter of the rate of these operations, and one a weight would take about as long as memory does.
template <typename T>
VS_DEVICE void widen_int8(uint32_t (&pairs)[2], uint32_t bytes) {
  VS_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t selector = i == 0 ? 0x4140 : 0x4342;
    if constexpr (std::is_same<T, vs::BFloat16>::value) {
      // 0x43 above a byte b: 128 + b for b below 128. Above the sign bit alone: 128, or 256 where it is set.
      const uint32_t x = vs::byte_permute(bytes, 0x43434343u, selector);
      pairs[i] = vs::subtract_pairs<T>(x & 0xFF7FFF7Fu, x & 0xFF80FF80u);
    } else {  // 0x64 above a byte b: 1024 + b. With its sign bit turned b is 128 more than it was.
      const uint32_t x = vs::byte_permute(bytes ^ 0x80808080u, 0x64646464u, selector);
      pairs[i] = vs::subtract_pairs<T>(x, 0x64806480u);
    }
  }
}

// A lane's part of a step: 16 columns of outputs lane / 4 and lane / 4 + 8 of each tile.
struct Int8Words {
  vs::Word16 of[kInt8Tiles][2];
};

// The block's given rows, from the lane's first column on.
template <typename T, bool kAligned>
struct Int8Rows {
  const T* first;
  int64_t stride;
  int last;

  // In place of a row that is not there any other will do: its sums reach no other row's.
  VS_DEVICE vs::Word16 load(int row, int column) const {
    const T* source = first + (row < last ? row : last) * stride + column;
    if constexpr (kAligned) return vs::load_readonly(source);
    return load_elements(source, kVectorElements<T>);
  }
};

// A warp's sums of 32 outputs and 8 * kGroups given rows over its columns.
template <typename T, int kGroups>
struct Int8Sums {
  float sums[kInt8Tiles][kGroups][4];

  template <class Rows>
  VS_DEVICE void add(const Int8Words& words, const Rows& rows, int column, bool there) {
    VS_UNROLL
    for (int half = 0; half < 2; ++half) {  // 8 columns: 16 bytes of a given row, two products
      vs::Word16 values[kGroups]{};
      VS_UNROLL
      for (int group = 0; group < kGroups; ++group)
        if (there)
          values[group] = rows.load(group * 8 + static_cast<int>(vs::lane_index() / 4), column + half * 8);
      VS_UNROLL
      for (int product = 0; product < 2; ++product) {
        VS_UNROLL
        for (int tile = 0; tile < kInt8Tiles; ++tile) {
          uint32_t outputs[4];
          VS_UNROLL
          for (int line = 0; line < 2; ++line) {
            uint32_t pairs[2];
            widen_int8<T>(pairs, words.of[tile][line].v[2 * half + product]);
            outputs[line] = pairs[0];
            outputs[line + 2] = pairs[1];
          }
          VS_UNROLL
          for (int group = 0; group < kGroups; ++group) {
            const uint32_t right[2] = {values[group].v[2 * product], values[group].v[2 * product + 1]};
            vs::mma<T>(sums[tile][group], outputs, right);
          }
        }
      }
    }
  }

  VS_DEVICE void store(float* part) const {
    const int lane = static_cast<int>(vs::lane_index());
    VS_UNROLL
    for (int i = 0; i < kInt8Tiles * kGroups * 4; ++i) {
      const int tile = i / (4 * kGroups), group = i / 4 % kGroups, output = lane / 4 + i % 4 / 2 * 8;
      part[(group * 8 + lane % 4 * 2 + i % 2) * kInt8Pitch + tile * 16 + output] = sums[tile][group][i % 4];
    }
  }
};

// Of float32 rows, without tensor cores: every lane multiplies its own columns with all 8 rows.
template <>
struct Int8Sums<float, 1> {
  float sums[kInt8Tiles][2][8];

  template <class Rows>
  VS_DEVICE void add(const Int8Words& words, const Rows& rows, int column, bool there) {
    if (!there) return;
    VS_UNROLL
    for (int word = 0; word < 4; ++word) {
      VS_UNROLL
      for (int row = 0; row < 8; ++row) {
        const vs::Word16 values = rows.load(row, column + word * 4);
        VS_UNROLL
        for (int i = 0; i < kInt8Tiles * 2 * 4; ++i) {
          const int tile = i / 8, line = i / 4 % 2, element = i % 4;
          const int8_t weight = static_cast<int8_t>(words.of[tile][line].v[word] >> (element * 8) & 0xFFu);
          float& sum = sums[tile][line][row];
          sum = vs::fused(static_cast<float>(weight), vector_element<float>(values, element), sum);
        }
      }
    }
  }

  VS_DEVICE void store(float* part) const {
    const int lane = static_cast<int>(vs::lane_index());
    VS_UNROLL
    for (int i = 0; i < kInt8Tiles * 2 * 8; ++i) {
      const int tile = i / 16, line = i / 8 % 2, row = i % 8;
      float sum = sums[tile][line][row];
      sum += vs::shuffle_xor(sum, 1);
      sum += vs::shuffle_xor(sum, 2);
      if (lane % 4 == row / 2) part[row * kInt8Pitch + tile * 16 + line * 8 + lane / 4] = sum;
    }
  }
};

// Blocks of the same outputs follow each other: all but the first may find the matrix in the L2 cache.
template <typename T, int kGroups, bool kAligned>
VS_KERNEL void VS_BOUNDS(kInt8Threads, sizeof(T) == 4 ? 1 : 2) int8_linear_rows(Int8Linear p) {
  constexpr int kRows = 8 * kGroups, kSteps = kInt8Steps<T, kGroups>;
  vs::Shared shared;
  float* parts = shared.array<float>(kInt8Warps * kInt8Part<kGroups>);
  const unsigned row_blocks = static_cast<unsigned>((p.M + kRows - 1) / kRows);
  const int64_t first_row = int64_t{vs::block_index().x % row_blocks} * kRows;
  const int64_t first_output = int64_t{vs::block_index().x / row_blocks} * kInt8Outputs;
  const int lane = static_cast<int>(vs::lane_index()), warp = static_cast<int>(vs::warp_index());

  const int own_column = lane % 4 * 16;
  const int64_t left = p.M - first_row;
  const int row_count = left < kRows ? static_cast<int>(left) : kRows;
  const Int8Rows<T, kAligned> rows{static_cast<const T*>(p.rows) + first_row * p.row_stride + own_column,
                                   p.row_stride, row_count - 1};
  const auto output_of = [&](int i) {  // in place of one that is not there, the last
    const int64_t output = first_output + i * 8 + lane / 4;
    return output < p.N ? output : p.N - 1;
  };
  const int8_t* line = p.weight + output_of(0) * p.C + own_column;
  int others[kInt8Tiles * 2];  // bytes between the lane's first output and each
  VS_UNROLL
  for (int i = 0; i < kInt8Tiles * 2; ++i) others[i] = static_cast<int>((output_of(i) - output_of(0)) * p.C);

  const int C = static_cast<int>(p.C), steps = (C + kInt8Columns - 1) / kInt8Columns;
  const int share = (steps + kInt8Warps - 1) / kInt8Warps, begin = warp * share;
  const int end = begin + share < steps ? begin + share : steps;
  // C may end within a step: some lanes then have none of its columns. What they hold of the weight is
  // finite, and meets zeros.
  const int own_steps = (C - own_column + kInt8Columns - 1) / kInt8Columns,
            own_end = own_steps < end ? own_steps : end;
  Int8Words words[kSteps]{};
  const auto fetch = [&](Int8Words& into, int step) {
    if (step >= own_end) return;
    VS_UNROLL
    for (int i = 0; i < kInt8Tiles * 2; ++i)
      into.of[i / 2][i % 2] = vs::load_streaming(line + step * kInt8Columns + others[i]);
  };

  Int8Sums<T, kGroups> sums{};
  VS_UNROLL
  for (int i = 0; i < kSteps; ++i) fetch(words[i], begin + i);
  for (int first = begin; first < end; first += kSteps) {
    VS_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const int step = first + i;
      if (step < end) {  // the same for the whole warp
        sums.add(words[i], rows, step * kInt8Columns, step < own_end);
        fetch(words[i], step + kSteps);
      }
    }
  }
  sums.store(parts + warp * kInt8Part<kGroups>);
  vs::sync_block();

  for (int i = static_cast<int>(vs::thread_index()); i < kRows * kInt8Outputs;
       i += static_cast<int>(kInt8Threads)) {
    const int row = i / kInt8Outputs, line = i % kInt8Outputs;
    const int64_t output = first_output + line;
    if (row >= row_count || output >= p.N) continue;
    float sum = 0.0f;
    for (int part = 0; part < kInt8Warps; ++part)
      sum += parts[part * kInt8Part<kGroups> + row * kInt8Pitch + line];
    const float bias = p.bias == nullptr ? 0.0f : vs::to_float(static_cast<const T*>(p.bias)[output]);
    static_cast<T*>(p.output)[(first_row + row) * p.output_stride + output] =
        vs::from_float<T>(vs::fused(p.scales[output], sum, bias));
  }
}

}  // namespace vispec::kernels
