// Where threads wait for others.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace sparse_attn::cpu {

// A thread that waits stays awake for some microseconds, as most waits are short. Then it sleeps:
// whom it waits for may need its processor.
//
// What a condition reads must be written by sequentially consistent operations, so that either the
// condition holds for a thread that is about to sleep, or who announces the change sees that
// thread.
class WaitingRoom {
 public:
  template <class Condition>
  void wait_until(Condition holds) {
    for (int i = 0; i < kGlances; ++i) {
      if (holds()) return;
      relax();
    }
    std::unique_lock lock(mutex_);
    ++sleepers_;
    changed_.wait(lock, holds);
    --sleepers_;
  }

  // To be called after a change that may end a wait.
  void announce() {
    if (sleepers_ == 0) return;
    {
      const std::lock_guard lock(mutex_);
    }  // a thread that was about to sleep does so now
    changed_.notify_all();
  }

 private:
  static constexpr int kGlances = 200;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  std::atomic<int64_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace sparse_attn::cpu
