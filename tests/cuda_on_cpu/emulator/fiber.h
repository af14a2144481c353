// Fibers: a stack for each CUDA thread, and switches between stacks. ucontext would need two system
// calls per switch, and a launch switches millions of times.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "expected x86-64 Linux: the fibers' switch of stacks is written for its calling convention"
#endif

namespace cuda_on_cpu {

// Saves the running stack's pointer in *from and switches to the stack whose saved pointer is `to`. Only
// callee-saved registers are saved; the compiler saves the others around the call.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}

// Stacks stay mapped between launches. The page below each faults if a kernel overflows its stack.
class Stacks {
 public:
  // The saved stack pointer of a fiber that will start in `entry`, which must not return.
  void* prepare(int fiber, void (*entry)()) {
    while (static_cast<int>(stacks_.size()) <= fiber) stacks_.push_back(map());
    // If tops were multiples of a large power of two, all fibers would share a few cache sets.
    const uintptr_t top = stacks_[fiber] + BYTES - (fiber % 64) * 1088 - 64;
    uintptr_t* words = reinterpret_cast<uintptr_t*>(top & ~uintptr_t{63});
    *--words = 0;  // in place of a caller's return address: ends unwinding
    *--words = reinterpret_cast<uintptr_t>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--words = 0;
    return words;
  }

 private:
  static constexpr size_t BYTES = 320 << 10, GUARD = 4096;

  static uintptr_t map() {
    void* memory = mmap(nullptr, GUARD + BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, GUARD, PROT_NONE);
    return reinterpret_cast<uintptr_t>(memory) + GUARD;
  }

  std::vector<uintptr_t> stacks_;
};

}  // namespace cuda_on_cpu
