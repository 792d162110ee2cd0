#include "emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(VS_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(VS_EMU_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// vs_emu_switch(void** save, void* next): keep the callee-saved registers on the old stack, take those on the
// new one. Floating-point control words are shared by all fibers and never changed here.
extern "C" void vs_emu_switch(void** save, void* next);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl vs_emu_switch
.hidden vs_emu_switch
.type vs_emu_switch, @function
vs_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vs_emu_switch, .-vs_emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl vs_emu_switch
.hidden vs_emu_switch
.type vs_emu_switch, %function
vs_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vs_emu_switch, .-vs_emu_switch
)");
#else
#error "the emulator's fiber switch is written for x86-64 and aarch64 only"
#endif

namespace vs::emu {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;  // ASan frames of an attention body take tens of KiB

std::vector<void*>& stack_pool() {
  static std::vector<void*> pool;
  return pool;
}

void* take_stack() {
  std::vector<void*>& pool = stack_pool();
  if (!pool.empty()) {
    void* stack = pool.back();
    pool.pop_back();
    return stack;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* base = static_cast<char*>(mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
    std::fprintf(stderr, "emulator: no memory for a fiber's stack\n");
    std::abort();
  }
  return base + page;
}

// What vs_emu_switch expects to pop: zeroed registers, then the address of `entry`.
VS_RAW void* initial_frame(void* stack, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  // `ret` must leave the stack pointer 8 below a multiple of 16, with a null return address on top.
  void** frame = reinterpret_cast<void**>(top - 64);
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
#else
  void** frame = reinterpret_cast<void**>(top - 160);
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  return frame;
}

}  // namespace

void prepare(Context& context, void (*entry)()) {
  context.stack = take_stack();
  context.stack_bytes = kStackBytes;
  context.asan_frame = nullptr;
#if defined(VS_EMU_TSAN)
  // Fresh pages make ThreadSanitizer forget the last owner's locals, which no edge orders before this
  // fiber's.
  constexpr size_t kFreshBytes = size_t{64} << 10;
  void* fresh = static_cast<char*>(context.stack) + kStackBytes - kFreshBytes;
  if (mmap(fresh, kFreshBytes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != fresh) {
    std::abort();
  }
#endif
#if defined(VS_EMU_ASAN)
  // The frames that never return (the entry point's) are the topmost ones: clear what they left poisoned.
  char* top = static_cast<char*>(context.stack) + kStackBytes;
  __asan_unpoison_memory_region(top - 4096, 4096);
#endif
  context.stack_pointer = initial_frame(context.stack, entry);
#if defined(VS_EMU_TSAN)
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void retire(Context& context) {
#if defined(VS_EMU_TSAN)
  __tsan_destroy_fiber(context.tsan_fiber);
#endif
  stack_pool().push_back(context.stack);
  context = Context{};
}

void adopt_current(Context& context) {
  context = Context{};
#if defined(VS_EMU_TSAN)
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

#if defined(VS_EMU_ASAN)
namespace {
// ASan tells the stack that is entered the bounds of the one that was left: the only way to learn those of
// the launching stack, which the switch back to it must name.
Context* left = nullptr;

VS_RAW void finish_asan_switch(Context& now) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(now.asan_frame, &bottom, &bytes);
  if (left != nullptr && left->stack == nullptr) {
    left->stack = const_cast<void*>(bottom);
    left->stack_bytes = bytes;
  }
}
}  // namespace
#endif

VS_RAW void switch_to(Context& from, Context& to, bool last) {
#if defined(VS_EMU_ASAN)
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_frame, to.stack, to.stack_bytes);
#endif
#if defined(VS_EMU_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: the switch itself orders nothing
#endif
  vs_emu_switch(&from.stack_pointer, to.stack_pointer);
#if defined(VS_EMU_ASAN)
  finish_asan_switch(from);
#endif
  (void)last;
}

VS_RAW void arrived(Context& context) {
#if defined(VS_EMU_ASAN)
  finish_asan_switch(context);
#endif
  (void)context;
}

VS_RAW void release(void* tag) {
#if defined(VS_EMU_TSAN)
  __tsan_release(tag);
#endif
  (void)tag;
}

VS_RAW void acquire(void* tag) {
#if defined(VS_EMU_TSAN)
  __tsan_acquire(tag);
#endif
  (void)tag;
}

}  // namespace vs::emu
