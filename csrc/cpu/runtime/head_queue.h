// The work of a call, cut into that of its KV heads, for any number of threads.
//
// Each thread starts one KV head after the other and works it off, so that packed memory stays in
// its own cache. While no head can be started, as none is left or memory has run out, it helps
// others. It waits only while others do what it needs: no thread waits where threads run one after
// the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "cpu/runtime/aligned_buffer.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/waiting_room.h"

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

  // Calls first(i), or else second(i), for what is left to take now; whether there was anything.
  template <class First, class Second>
  bool help(First first, Second second) {
    if (!is_open_) return false;
    return first_.take_all(first) || (first_.is_done() && second_.take_all(second));
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
//   help(scratch)          takes what is left of one phase, but for what must wait for others;
//                          returns whether there was anything
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
      work(thread, scratch.data());
    } catch (...) {
      has_failed_ = true;  // nobody waits for this thread
      announce();
      leave_(saved);
      throw;
    }
    end_streaming();
    leave_(saved);
  }

  // Works off heads of this thread and helps others, until all is taken.
  void work(int64_t thread, std::byte* scratch) {
    Work* own = nullptr;
    while (!has_failed_) {
      const int64_t seen = events_;  // later ones end the wait below
      if (own == nullptr || own->is_taken()) own = start_head(thread);
      if (own == nullptr) {
        if (help_others(thread, scratch)) continue;
        if (is_all_taken()) return;
      } else if (help(*own, scratch) || own->is_taken()) {
        continue;
      }
      waiting_.wait_until([&] { return events_ != seen; });
    }
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
    announce();
    return head;
  }

  bool help(Work& head, std::byte* scratch) {
    const bool helped = head.help(scratch);
    if (helped) announce();
    return helped;
  }

  bool help_others(int64_t thread, std::byte* scratch) {
    bool helped = false;
    for (int64_t i = 0; i < num_heads(); ++i) {
      helped |= help(heads_[(thread + i) % num_heads()], scratch);
    }
    return helped;
  }

  bool is_all_taken() const {
    return std::all_of(heads_.begin(), heads_.end(), [](const Work& x) { return x.is_taken(); });
  }

  // Something has become free to take, has been done, or will not be done.
  void announce() {
    ++events_;
    waiting_.announce();
  }

  std::deque<Work>& heads_;
  uint32_t (*enter_)();
  void (*leave_)(uint32_t);
  int64_t slot_bytes_ = 0, most_slots_ = 1, scratch_bytes_ = 0;
  std::mutex mutex_;
  int64_t next_head_ = 0;
  std::vector<Slot> slots_;
  std::atomic<bool> has_failed_{false};
  std::atomic<int64_t> events_{0};
  WaitingRoom waiting_;
};

}  // namespace sparse_attn::cpu
