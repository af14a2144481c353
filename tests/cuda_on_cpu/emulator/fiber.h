// Fibers: a stack for each CUDA thread, and the switch from one stack to another. ucontext does the
// same with two system calls a switch, and a launch switches millions of times.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "expected x86-64 Linux: the fibers' switch of stacks is written for its calling convention"
#endif

namespace cuda_on_cpu {

// Leaves the running stack, remembered in *from, for the one that was remembered as `to`. Only what
// a callee has to preserve is saved; the compiler has saved the rest around the call.
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

// Stacks stay mapped from launch to launch. The page below each faults when a kernel outgrows it.
class Stacks {
 public:
  // The remembered stack pointer of a fiber that will begin in `entry`, which must not return.
  void* prepare(int fiber, void (*entry)()) {
    while (static_cast<int>(stacks_.size()) <= fiber) stacks_.push_back(map());
    // Tops at multiples of a large power of two would have all fibers share a few cache sets.
    const uintptr_t top = stacks_[fiber] + BYTES - (fiber % 64) * 1088 - 64;
    uintptr_t* words = reinterpret_cast<uintptr_t*>(top & ~uintptr_t{63});
    *--words = 0;  // where a caller's return address would be: unwinding ends
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
