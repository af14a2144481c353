// The threads of the running block: the current one, what others wait for, and errors.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "cuda_language.h"
#include "fiber.h"

namespace cuda_on_cpu {

constexpr int MAX_THREADS = 1024;

// What a thread waits for, for reports of deadlocks. `object` is an address, a barrier's number or a
// mask of lanes; `detail` is a parity or a count.
enum class Event { none, mbarrier, named_barrier, lanes, products };
struct Wait {
  Event event = Event::none;
  uint32_t object = 0, detail = 0;
};

struct Thread {
  void* stack_pointer = nullptr;
  bool ready = false, exited = false;
  Wait wait;
};

struct Threads {
  Thread all[MAX_THREADS];
  int count = 0, alive = 0;
  int current = -1;  // none while the scheduler or the copy engine runs
  void* scheduler = nullptr;
  std::exception_ptr error;
};
inline Threads threads;

inline int current_thread() { return threads.current; }
inline int current_lane() { return threads.current % 32; }
inline int current_warp() { return threads.current / 32; }

// Throws an error of the emulation. The message starts with the block, and the thread if one is running.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  std::string place = "block " + std::to_string(blockIdx.x);
  if (threads.current >= 0) place += ", thread " + std::to_string(threads.current);
  throw std::runtime_error(place + ": " + message);
}

// Lets other threads run until one of them wakes the current thread. Nothing on the stack may own memory
// here: after an error in another thread, this one never resumes.
inline void wait_for(Event event, uint32_t object, uint32_t detail) {
  Thread& self = threads.all[threads.current];
  self.ready = false;
  self.wait = {event, object, detail};
  switch_stack(&self.stack_pointer, threads.scheduler);
}

inline void wake(int thread) { threads.all[thread].ready = true; }

}  // namespace cuda_on_cpu
