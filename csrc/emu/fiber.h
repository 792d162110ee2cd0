// A stack of its own for every emulated GPU thread, and the switch between two of them.
//
// Everything here runs while two stacks are half entered, so it must never be instrumented: VS_RAW keeps the
// sanitizers out of single functions, which lets the build pass one set of flags to every file.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define VS_EMU_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define VS_EMU_TSAN 1
#endif

#define VS_RAW __attribute__((noinline, no_sanitize("address", "undefined", "thread")))

namespace vs::emu {

struct Context {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // lowest usable byte; null for the context that launches
  size_t stack_bytes = 0;
  void* asan_frame = nullptr;
  void* tsan_fiber = nullptr;
};

// Gives `context` a stack (pooled, with a guard page below) which calls `entry` at the first switch to it.
void prepare(Context& context, void (*entry)());
// Returns the stack to the pool; the context must never be switched to again.
void retire(Context& context);
// Makes `context` stand for the caller's own stack.
void adopt_current(Context& context);

// Leaves `from` (for ever if `last`) and continues `to`.
VS_RAW void switch_to(Context& from, Context& to, bool last);
// The first thing that runs on a fresh stack.
VS_RAW void arrived(Context& context);

// Happens-before edges for ThreadSanitizer; nothing elsewhere.
VS_RAW void release(void* tag);
VS_RAW void acquire(void* tag);

}  // namespace vs::emu
