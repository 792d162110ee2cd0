// What csrc/rt.h asks of the emulator: the threads of one block as fibers, blocks one after another.
//
// Order: blocks are visited, and runnable fibers picked, in an order drawn from a seed (0: ascending), so a
// kernel that leans on an order fails for some seed. Shared memory is filled with 0xFF (NaN as any float),
// each array is poisoned around under AddressSanitizer and framed by canaries elsewhere. Faults abort with a
// message that starts with "emulator:" and names block, thread and source line.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emu/fiber.h"

namespace vs::emu {

// In a namespace of its own, lest a Site among the arguments bring this file's functions into overload
// resolution.
namespace sites {
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
}  // namespace sites
using sites::Site;

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// Runs `body(argument)` once for every thread of every block.
void run(Index3 grid, unsigned threads, size_t shared_bytes, void (*body)(void*), void* argument);
// The seed of later launches; the first comes from VISPEC_EMULATOR_SEED (default 1).
void set_seed(uint64_t seed);
// What a block may ask for, in bytes: an H100's 227 KiB at first. A launch that asks for more is refused.
size_t shared_limit();
void set_shared_limit(size_t bytes);

VS_RAW unsigned thread_index();
VS_RAW unsigned thread_count();
VS_RAW Index3 block_index();
VS_RAW Index3 grid_size();

// The array number `ordinal` of this block's shared memory: the first thread to ask lays it out, the others
// must ask for the same size.
VS_RAW void* shared_array(unsigned ordinal, size_t bytes, Site site);

VS_RAW void sync_block(Site site);
VS_RAW void sync_warp(Site site);

// Warp collectives. None of them orders memory, as on the device.
VS_RAW uint64_t shuffle(uint64_t value, unsigned source_lane, Site site);
VS_RAW uint32_t ballot(bool vote, Site site);
// out[i] of lane l: two 16-bit elements of 8x8 matrix i, whose row r was read by lane 8i + r.
VS_RAW void spread_matrix(uint32_t* out, const uint32_t* row, int matrices, bool transposed, Site site);
// D = A B + D for one m16n8k16 product; elements are bf16 or f16, sums float.
VS_RAW void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Site site);

// Asynchronous copies of this thread that have been issued and not yet waited for.
struct AsyncCopy {
  void* destination;
  const void* source;
  uint32_t bytes, source_bytes;  // the rest is zero-filled
  uint32_t group;
};
VS_RAW void queue_copy(AsyncCopy copy, Site site);
VS_RAW void commit_copies();
// Takes one finished copy (older than the last `pending` groups) off the queue; false when there is none.
VS_RAW bool finish_copy(unsigned pending, AsyncCopy* copy);

[[noreturn]] VS_RAW void fail(Site site, const char* what);
[[noreturn]] VS_RAW void fail_alignment(Site site, const void* pointer, size_t alignment);

}  // namespace vs::emu
