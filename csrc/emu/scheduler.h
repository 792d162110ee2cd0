// The emulator's own state, shared by scheduler (emulator.cpp) and warp collectives (warp.cpp).
#pragma once

#include "emu/emulator.h"

namespace vs::emu {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCopies = 128;

enum class State : uint8_t { ready, running, waiting, done };
enum class Kind : uint8_t { none, block_barrier, warp_barrier, shuffle, ballot, load_matrix, mma };

struct Fiber {
  Context context;
  unsigned thread = 0;
  State state = State::ready;
  Kind kind = Kind::none;  // where it waits, or last waited
  Site site{"", 0};
  AsyncCopy queue[kMaxCopies];  // a ring
  unsigned copies = 0, first_copy = 0;
  unsigned groups = 0;  // committed so far
};

// Threads that meet: a block, or a warp.
struct Group {
  unsigned arrived = 0, phase = 0, first_thread = 0;
  Kind kind = Kind::none;
  Site site{"", 0};
  char* tags = nullptr;  // two, whose addresses no other block has
};

// What one lane brings to a collective.
union Slot {
  uint64_t word;
  uint32_t row[4];
  float operands[12];
};

VS_RAW Fiber& self();
// The warp's slots of one phase. A lane is at most one collective ahead of its warp, so two phases suffice.
VS_RAW Slot* slots(unsigned phase);
VS_RAW unsigned warp_phase();
// Returns once all `size` threads from `first` on have come to the same place; the phase whose slots to read.
VS_RAW unsigned meet(Group& group, unsigned first, unsigned size, Kind kind, Site site, bool orders_memory);
VS_RAW unsigned meet_warp(Kind kind, Site site, bool orders_memory);

}  // namespace vs::emu
