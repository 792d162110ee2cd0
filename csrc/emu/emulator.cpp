#include "emu/emulator.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#if defined(VS_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "emu/scheduler.h"

namespace vs::emu {
namespace {

constexpr size_t kRedZone = 64;
constexpr unsigned kMaxArrays = 32;
constexpr unsigned char kCanary = 0xA5;
constexpr size_t kAlign = 16;  // what the device's carver promises, and no more

struct SharedArray {
  unsigned char* start;
  size_t bytes;
};

struct Shared {
  unsigned char* arena;
  size_t arena_bytes, requested, used;  // used: as the device's carver counts
  unsigned char* cursor;
  SharedArray arrays[kMaxArrays];
  unsigned count;
};

Fiber* g_fibers = nullptr;  // kMaxThreads of them, reused by every block
Fiber* g_self = nullptr;
Context g_main;
unsigned g_threads = 0, g_live = 0;
unsigned g_ready[kMaxThreads];  // a ring
unsigned g_ready_head = 0, g_ready_count = 0;
Group g_block_group;
Group g_warp_groups[kMaxThreads / kWarp];
Slot g_slots[kMaxThreads / kWarp][2][kWarp];
Index3 g_block, g_grid;
Shared g_shared;
void (*g_body)(void*) = nullptr;
void* g_argument = nullptr;
char g_end_tag = 0;
uint64_t g_seed = 1, g_random = 1;
size_t g_shared_limit = 227 << 10;
std::mutex g_mutex;

VS_RAW uint64_t draw() {
  g_random ^= g_random << 13;
  g_random ^= g_random >> 7;
  g_random ^= g_random << 17;
  return g_random;
}

VS_RAW void make_ready(unsigned thread) {
  g_fibers[thread].state = State::ready;
  g_ready[(g_ready_head + g_ready_count++) % kMaxThreads] = thread;
}

const char* name(Kind kind) {
  switch (kind) {
    case Kind::block_barrier: return "block barrier";
    case Kind::warp_barrier: return "warp barrier";
    case Kind::shuffle: return "shuffle";
    case Kind::ballot: return "vote";
    case Kind::load_matrix: return "ldmatrix";
    case Kind::mma: return "mma";
    default: return "nothing";
  }
}

VS_RAW void print_where() {
  std::fprintf(stderr, " [block (%u, %u, %u), thread %u]\n", g_block.x, g_block.y, g_block.z,
               g_self == nullptr ? 0 : g_self->thread);
}

VS_RAW bool same_wait(const Fiber& a, const Fiber& b) {
  if (a.state != b.state) return false;
  return a.state == State::done ||
         (a.kind == b.kind && a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0);
}

[[noreturn]] VS_RAW void report_deadlock() {
  std::fprintf(stderr, "emulator: deadlock in block (%u, %u, %u): no thread can run\n", g_block.x, g_block.y,
               g_block.z);
  for (unsigned first = 0; first < g_threads;) {
    unsigned last = first;
    while (last + 1 < g_threads && same_wait(g_fibers[first], g_fibers[last + 1])) ++last;
    const Fiber& fiber = g_fibers[first];
    if (fiber.state == State::done) {
      std::fprintf(stderr, "  threads %u-%u have exited\n", first, last);
    } else {
      std::fprintf(stderr, "  threads %u-%u wait at the %s in %s:%d\n", first, last, name(fiber.kind),
                   fiber.site.file, fiber.site.line);
    }
    first = last + 1;
  }
  std::abort();
}

// Picks the next runnable fiber (at random, unless the seed is 0) and continues it.
VS_RAW void leave(bool last) {
  Fiber* from = g_self;
  if (g_live == 0) {
    g_self = nullptr;
    switch_to(from->context, g_main, last);
    return;
  }
  if (g_ready_count == 0) report_deadlock();
  if (g_seed != 0) {
    unsigned pick = (g_ready_head + draw() % g_ready_count) % kMaxThreads;
    unsigned swap = g_ready[pick];
    g_ready[pick] = g_ready[g_ready_head];
    g_ready[g_ready_head] = swap;
  }
  Fiber* to = &g_fibers[g_ready[g_ready_head]];
  g_ready_head = (g_ready_head + 1) % kMaxThreads;
  --g_ready_count;
  to->state = State::running;
  g_self = to;
  switch_to(from->context, to->context, last);
}

VS_RAW void enter() {
  arrived(g_self->context);
  g_body(g_argument);
  release(&g_end_tag);
  g_self->state = State::done;
  --g_live;
  leave(true);
  std::abort();  // a finished fiber is never continued
}

// The canaries around every array, for builds without AddressSanitizer.
VS_RAW void check_canaries() {
#if !defined(VS_EMU_ASAN)
  const unsigned char* p = g_shared.arena;
  for (unsigned i = 0; i <= g_shared.count; ++i) {
    const bool tail = i == g_shared.count;
    const unsigned char* end = tail ? g_shared.arena + g_shared.arena_bytes : g_shared.arrays[i].start;
    for (; p < end; ++p) {
      if (*p == kCanary) continue;
      std::fprintf(stderr,
                   "emulator: shared memory overflow between arrays %d and %d in block (%u, %u, %u)\n",
                   static_cast<int>(i) - 1, static_cast<int>(i), g_block.x, g_block.y, g_block.z);
      std::abort();
    }
    if (!tail) p = end + g_shared.arrays[i].bytes;
  }
#endif
}

void open_shared(size_t bytes) {
  g_shared = Shared{};
  g_shared.requested = bytes;
  g_shared.arena_bytes = bytes + kMaxArrays * (kRedZone + kAlign) + kRedZone;
  g_shared.arena = static_cast<unsigned char*>(std::aligned_alloc(64, (g_shared.arena_bytes + 63) / 64 * 64));
  std::memset(g_shared.arena, kCanary, g_shared.arena_bytes);
  g_shared.cursor = g_shared.arena + kRedZone;
#if defined(VS_EMU_ASAN)
  __asan_poison_memory_region(g_shared.arena, g_shared.arena_bytes);
#endif
}

void free_arena(unsigned char* arena, size_t bytes) {
#if defined(VS_EMU_ASAN)
  __asan_unpoison_memory_region(arena, bytes);
#endif
  (void)bytes;
  std::free(arena);
}

constexpr unsigned kBlockTags = 2 * (1 + kMaxThreads / kWarp);

void run_block(unsigned threads, char* tags) {
  g_threads = g_live = threads;
  g_ready_head = g_ready_count = 0;
  g_block_group = Group{};
  g_block_group.tags = tags;
  for (unsigned w = 0; w < threads / kWarp; ++w) {
    g_warp_groups[w] = Group{};
    g_warp_groups[w].tags = tags + 2 * (1 + w);
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = g_fibers[t];
    fiber.thread = t;
    fiber.kind = Kind::none;
    fiber.copies = fiber.first_copy = fiber.groups = 0;
    prepare(fiber.context, enter);
    make_ready(t);
  }
  adopt_current(g_main);
  if (g_seed != 0) std::swap(g_ready[0], g_ready[draw() % threads]);
  g_ready_head = 1;
  g_ready_count = threads - 1;
  g_self = &g_fibers[g_ready[0]];
  g_self->state = State::running;
  switch_to(g_main, g_self->context, false);  // the last thread to exit comes back here
  check_canaries();
  for (unsigned t = 0; t < threads; ++t) retire(g_fibers[t].context);
}

}  // namespace

void set_seed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_seed = seed;
}

size_t shared_limit() {
  std::lock_guard<std::mutex> lock(g_mutex);
  return g_shared_limit;
}

void set_shared_limit(size_t bytes) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_shared_limit = bytes;
}

void run(Index3 grid, unsigned threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  std::lock_guard<std::mutex> lock(g_mutex);
  static const bool seeded = [] {
    const char* text = std::getenv("VISPEC_EMULATOR_SEED");
    if (text != nullptr) g_seed = std::strtoull(text, nullptr, 10);
    return text != nullptr;
  }();
  (void)seeded;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0 || blocks == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > g_shared_limit) {
    std::fprintf(stderr, "emulator: launch refused: grid (%u, %u, %u), %u threads, %zu shared bytes\n",
                 grid.x, grid.y, grid.z, threads, shared_bytes);
    std::abort();
  }
  if (g_fibers == nullptr) g_fibers = new Fiber[kMaxThreads];
  g_random = g_seed * 0x9E3779B97F4A7C15ull + 1;
  g_grid = grid;
  g_body = body;
  g_argument = argument;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (g_seed != 0) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  }
  std::vector<std::pair<unsigned char*, size_t>> arenas;
  // A barrier orders the threads of its own block alone: one that met where an earlier block's did would hide
  // a missing fence between the two.
  std::vector<char> tags(blocks * kBlockTags);
  for (uint64_t index : order) {
    g_block = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
               static_cast<unsigned>(index / grid.x / grid.y)};
    open_shared(shared_bytes);
    run_block(threads, tags.data() + index * kBlockTags);
#if defined(VS_EMU_TSAN)
    // Freed once all blocks are ordered before this thread: until then a reused address would look like a
    // race.
    arenas.emplace_back(g_shared.arena, g_shared.arena_bytes);
#else
    free_arena(g_shared.arena, g_shared.arena_bytes);
#endif
  }
  acquire(&g_end_tag);
  for (auto& [arena, bytes] : arenas) free_arena(arena, bytes);
  g_self = nullptr;
}

VS_RAW unsigned thread_index() { return g_self->thread; }
VS_RAW unsigned thread_count() { return g_threads; }
VS_RAW Index3 block_index() { return g_block; }
VS_RAW Index3 grid_size() { return g_grid; }

VS_RAW void* shared_array(unsigned ordinal, size_t bytes, Site site) {
  if (ordinal < g_shared.count) {
    if (g_shared.arrays[ordinal].bytes != bytes) {
      fail(site, "threads carve shared memory differently");
    }
    return g_shared.arrays[ordinal].start;
  }
  const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
  if (ordinal >= kMaxArrays) fail(site, "more than 32 shared arrays");
  if (g_shared.used + rounded > g_shared.requested)
    fail(site, "more shared memory carved than the launch asks for");
  g_shared.used += rounded;
  unsigned char* start = g_shared.cursor;
  g_shared.cursor += rounded + kRedZone;
  g_shared.arrays[ordinal] = {start, bytes};
  g_shared.count = ordinal + 1;
#if defined(VS_EMU_ASAN)
  __asan_unpoison_memory_region(start, bytes);
#endif
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(start)[i] = 0xFF;
  return start;
}

VS_RAW Fiber& self() { return *g_self; }

VS_RAW Slot* slots(unsigned phase) { return g_slots[g_self->thread / kWarp][phase]; }

VS_RAW unsigned warp_phase() { return g_warp_groups[g_self->thread / kWarp].phase; }

VS_RAW unsigned meet(Group& group, unsigned first, unsigned size, Kind kind, Site site, bool orders_memory) {
  Fiber& me = *g_self;
  if (group.arrived == 0) {
    group.kind = kind;
    group.site = site;
    group.first_thread = me.thread;
  } else if (group.kind != kind || group.site.line != site.line ||
             std::strcmp(group.site.file, site.file) != 0) {
    std::fprintf(
        stderr,
        "emulator: divergence: thread %u waits at the %s in %s:%d, thread %u arrives at the %s in %s:%d",
        group.first_thread, name(group.kind), group.site.file, group.site.line, me.thread, name(kind),
        site.file, site.line);
    print_where();
    std::abort();
  }
  const unsigned phase = group.phase;
  // Two tags in turn: with one, an early arrival at the next meeting would be ordered before late leavers of
  // this one, and races between the two would go unseen.
  if (orders_memory) release(&group.tags[phase]);
  me.kind = kind;
  me.site = site;
  if (++group.arrived == size) {
    group.arrived = 0;
    group.phase ^= 1;
    for (unsigned t = first; t < first + size; ++t) {
      if (t != me.thread) make_ready(t);
    }
  } else {
    me.state = State::waiting;
    leave(false);
  }
  if (orders_memory) acquire(&group.tags[phase]);
  return phase;
}

VS_RAW unsigned meet_warp(Kind kind, Site site, bool orders_memory) {
  const unsigned warp = g_self->thread / kWarp;
  return meet(g_warp_groups[warp], warp * kWarp, kWarp, kind, site, orders_memory);
}

VS_RAW void sync_block(Site site) { meet(g_block_group, 0, g_threads, Kind::block_barrier, site, true); }

VS_RAW void sync_warp(Site site) { meet_warp(Kind::warp_barrier, site, true); }

[[noreturn]] VS_RAW void fail(Site site, const char* what) {
  std::fprintf(stderr, "emulator: %s in %s:%d", what, site.file, site.line);
  print_where();
  std::abort();
}

[[noreturn]] VS_RAW void fail_alignment(Site site, const void* pointer, size_t alignment) {
  std::fprintf(stderr, "emulator: address %p is not a multiple of %zu in %s:%d", pointer, alignment,
               site.file, site.line);
  print_where();
  std::abort();
}

}  // namespace vs::emu
