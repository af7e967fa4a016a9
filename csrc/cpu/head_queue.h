// The work of a call, cut into that of its KV heads, for any number of threads.
//
// Each thread starts one KV head after the other and works it off, so that packed memory stays in
// its own cache. While no head can be started, as none is left or memory has run out, it helps
// others.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "aligned_buffer.h"
#include "forward.h"

namespace sparse_attn::cpu {

// What each calling thread keeps of the memory for packed tensors, as fresh pages cost more than
// packing.
inline constexpr int64_t kKeptBytes = int64_t{64} << 20;

// Two kinds of numbered tasks, which any number of threads take: those of the second kind when all
// of the first are done.
class TwoPhases {
 public:
  // Lets threads in.
  void open(int64_t num_first, int64_t num_second) {
    first_.num = num_first;
    second_.num = num_second;
    is_open_ = true;
  }

  // Calls first(i) and second(i) for what is left to take now; whether there was anything.
  template <class First, class Second>
  bool help(First first, Second second) {
    if (!is_open_) return false;
    const bool helped = first_.take_all(first);
    if (!first_.is_done()) return helped;
    return second_.take_all(second) || helped;
  }

  bool is_taken() const { return is_open_ && first_.is_taken() && second_.is_taken(); }
  bool is_done() const { return is_open_ && first_.is_done() && second_.is_done(); }

 private:
  struct Phase {
    int64_t num = 0;
    std::atomic<int64_t> next{0}, done{0};

    bool is_taken() const { return next >= num; }
    bool is_done() const { return done == num; }

    template <class Task>
    bool take_all(Task& task) {
      bool took = false;
      for (int64_t i; next < num && (i = next++) < num; took = true) {
        task(i);
        ++done;
      }
      return took;
    }
  };

  std::atomic<bool> is_open_{false};
  Phase first_, second_;
};

// `Work` is that of one KV head:
//   list()                 to be called before the rest; a second call does nothing
//   num_multiplications()
//   packed_bytes()         of memory that it needs from open() until is_done()
//   scratch_bytes()        of memory that a thread needs for help()
//   open(memory)           lets threads in
//   help(scratch)          takes what is left, but for what must wait for others; returns whether
//                          there was anything
//   is_taken(), is_done()  whether nothing is left to take, whether all that was taken is done
template <class Work>
class HeadQueue {
 public:
  // Memory for packed tensors stays below `allowed_bytes`, if one head needs no more.
  // `enter` and `leave` are the kernel's.
  HeadQueue(std::deque<Work>& heads, int64_t allowed_bytes, uint32_t (*enter)(),
            void (*leave)(uint32_t))
      : heads_(heads), enter_(enter), leave_(leave) {
    for (const Work& head : heads) {
      slot_bytes_ = std::max(slot_bytes_, head.packed_bytes());
      scratch_bytes_ = std::max(scratch_bytes_, head.scratch_bytes());
    }
    most_slots_ =
        slot_bytes_ == 0 ? num_heads() : std::max<int64_t>(1, allowed_bytes / slot_bytes_);
  }

  void run(const Parallel& threads) {
    thread_local AlignedBuffer memory;
    const int64_t num_threads = is_small() ? 1 : threads.num_threads;
    slots_.resize(std::min({num_threads, num_heads(), most_slots_}));
    memory.reserve(slots_.size() * slot_bytes_);
    for (size_t i = 0; i < slots_.size(); ++i) slots_[i].memory = memory.data() + i * slot_bytes_;
    if (num_threads == 1) {
      run_thread(0);
    } else {
      threads.run(num_threads, [&](int64_t i) { run_thread(i); });
    }
    if (memory.capacity() > kKeptBytes) memory.release();
  }

 private:
  // Packed memory of one head.
  struct Slot {
    std::byte* memory = nullptr;
    const Work* user = nullptr;
  };

  int64_t num_heads() const { return static_cast<int64_t>(heads_.size()); }

  // Other threads wake up in the time that one needs for about a million multiplications.
  bool is_small() {
    constexpr int64_t kWorthThreads = 1 << 20;
    int64_t multiplications = 0;
    for (Work& head : heads_) {
      head.list();
      multiplications += head.num_multiplications();
      if (multiplications >= kWorthThreads) return false;
    }
    return true;
  }

  void run_thread(int64_t thread) {
    thread_local AlignedBuffer scratch;
    const uint32_t saved = enter_();
    try {
      scratch.reserve(scratch_bytes_);
      while (!has_failed_) {
        if (Work* head = start_head(thread)) {
          while (!head->is_taken() && !has_failed_) {
            if (!head->help(scratch.data())) std::this_thread::yield();
          }
        } else if (!help_others(thread, scratch.data())) {
          break;
        }
      }
    } catch (...) {
      has_failed_ = true;  // nobody waits for this thread
      leave_(saved);
      throw;
    }
    end_streaming();
    leave_(saved);
  }

  // What this thread has written past the caches comes before what it does next.
  static void end_streaming() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  }

  // Null if no head is left, or no slot: a thread's own one is free when nobody helps it.
  Work* start_head(int64_t thread) {
    Work* head = nullptr;
    Slot* slot = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (next_head_ == num_heads()) return nullptr;
      for (size_t i = 0; i < slots_.size() && slot == nullptr; ++i) {
        Slot& candidate = slots_[(thread + i) % slots_.size()];
        if (candidate.user == nullptr || candidate.user->is_done()) slot = &candidate;
      }
      if (slot == nullptr) return nullptr;
      head = &heads_[next_head_++];
      slot->user = head;
    }
    head->list();
    head->open(slot->memory);
    return head;
  }

  // Whether anything is left to take now or later.
  bool help_others(int64_t thread, std::byte* scratch) {
    bool helped = false, is_left = false;
    for (int64_t i = 0; i < num_heads(); ++i) {
      Work& head = heads_[(thread + i) % num_heads()];
      helped |= head.help(scratch);
      is_left |= !head.is_taken();
    }
    if (!helped) std::this_thread::yield();
    return is_left;
  }

  std::deque<Work>& heads_;
  uint32_t (*enter_)();
  void (*leave_)(uint32_t);
  int64_t slot_bytes_ = 0, most_slots_ = 1, scratch_bytes_ = 0;
  std::mutex mutex_;
  int64_t next_head_ = 0;
  std::vector<Slot> slots_;
  std::atomic<bool> has_failed_{false};
};

}  // namespace sparse_attn::cpu
