// A call neither gives way nor waits when there is nothing to wait for, and a thread that waits
// long sleeps.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "calls.h"
#include "cpu/runtime/waiting_room.h"

namespace {

std::atomic<int> yields{0};

}  // namespace

// In place of the C library's, for the whole program.
extern "C" int sched_yield() noexcept {
  ++yields;
  return 0;
}

namespace {

void check_that_nobody_gives_way(Isa isa) {
  for_each_call([&](Call& call) {
    for (const Parallel& parallel :
         {one_after_the_other(1), one_after_the_other(3), at_once(2), at_once(3)}) {
      call.run(isa, parallel);
      if (yields > 0) {
        fail(call.name + " gave way " + std::to_string(yields) + " times on " +
             std::to_string(parallel.num_threads) + " threads");
      }
    }
  });
}

// A thread that waits long looks at its condition only some hundred times.
void check_that_long_waits_are_slept_through() {
  sparse_attn::cpu::WaitingRoom room;
  std::atomic<bool> is_over{false};
  int64_t looks = 0;
  std::thread waiter([&] {
    room.wait_until([&] {
      ++looks;
      return is_over.load();
    });
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  is_over = true;
  room.announce();
  waiter.join();
  if (looks > 1000) fail("a thread looked " + std::to_string(looks) + " times while it waited");
}

// Two threads take turns; if an announcement were lost, this would not end.
void check_turns() {
  constexpr int kTurns = 400;
  sparse_attn::cpu::WaitingRoom room;
  std::atomic<int> turn{0};
  const auto play = [&](int parity) {
    for (int i = parity; i < kTurns; i += 2) {
      room.wait_until([&] { return turn == i; });
      // Now and then the other one falls asleep.
      if (i % 8 < 2) std::this_thread::sleep_for(std::chrono::microseconds(1));
      turn = i + 1;
      room.announce();
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
}

}  // namespace

int main() {
  check_that_long_waits_are_slept_through();
  check_turns();
  for (int level = 0; level < sparse_attn::cpu::kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!is_supported(isa)) continue;
    check_that_nobody_gives_way(isa);
    std::printf("%s: no call gives way\n", isa_name(isa));
  }
  return 0;
}
