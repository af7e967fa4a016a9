// What threads may do to each other. A call neither gives way nor waits when there is nothing to
// wait for, and a long wait is slept through. Whatever another thread writes into the lists of a
// call, the call gives the result of the lists that it has checked, or refuses them; buffers have
// their exact sizes, so that AddressSanitizer sees any access outside of them.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/backward.h"
#include "../../csrc/cpu/forward.h"
#include "../../csrc/cpu/hip.h"
#include "../../csrc/cpu/infinite_hip.h"
#include "../../csrc/cpu/top_blocks.h"
#include "../../csrc/cpu/varlen.h"
#include "../../csrc/cpu/waiting_room.h"

namespace {

std::atomic<int> yields{0};

}  // namespace

// In place of the C library's, for the whole program.
extern "C" int sched_yield() noexcept {
  ++yields;
  return 0;
}

namespace {

using sparse_attn::AttentionParams;
using sparse_attn::BackwardParams;
using sparse_attn::cpu::Isa;
using sparse_attn::cpu::Packing;
using sparse_attn::cpu::Parallel;

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

std::vector<float> random_floats(int64_t n) {
  static std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& x : values) x = normal(generator);
  return values;
}

// `sink` and so on are what the call reads; the rest of a call lies in what is derived.
struct Call {
  static constexpr int64_t kHeads = 4, kKvHeads = 2, kDim = 32, kBlock = 32;

  std::string name;
  std::vector<std::pair<const char*, std::vector<int32_t>*>> lists;
  std::vector<std::vector<float>*> results;

  virtual ~Call() = default;
  virtual void run(Isa isa, const Parallel& parallel) = 0;
  virtual bool reads_a_copy() const { return true; }

 protected:
  explicit Call(const char* n) : name(n) {}
};

// Attention, whose layout has all kinds of lists.
struct Attention : Call {
  AttentionParams params;
  std::vector<float> q, k, v, out, lse;
  std::vector<int32_t> sink{1, 0}, window{5};
  std::vector<int32_t> block_counts, block_indices, column_counts, column_indices;

  Attention(const char* n, int64_t seqlen_q, int64_t seqlen_kv)
      : Call(n),
        q(random_floats(kHeads * seqlen_q * kDim)),
        k(random_floats(kKvHeads * seqlen_kv * kDim)),
        v(random_floats(kKvHeads * seqlen_kv * kDim)),
        out(q.size()),
        lse(kHeads * seqlen_q) {
    lists = {{"sink", &sink},
             {"window", &window},
             {"kv_num_blocks", &block_counts},
             {"kv_indices", &block_indices},
             {"num_columns", &column_counts},
             {"column_indices", &column_indices}};
    results = {&out, &lse};
    params.batch = 1;
    params.num_heads = kHeads;
    params.num_kv_heads = kKvHeads;
    params.seqlen_q = seqlen_q;
    params.seqlen_kv = seqlen_kv;
    params.head_dim = params.head_dim_v = kDim;
    params.block_q = params.block_kv = kBlock;
    const int64_t rows = (seqlen_q + kBlock - 1) / kBlock;
    const int64_t blocks = (seqlen_kv + kBlock - 1) / kBlock;
    params.blocks = list_every_other(block_counts, block_indices, kHeads, rows, blocks);
    params.columns = list_every_other(column_counts, column_indices, 1, rows, seqlen_kv);
    params.sink = {sink.data(), 2};
    params.window = {window.data(), 1};
    params.q = q.data();
    params.k = k.data();
    params.v = v.data();
    params.out = out.data();
    params.lse = lse.data();
    params.lse_stride = seqlen_q;
    params.q_stride = params.out_stride = {0, seqlen_q * kDim, kDim};
    params.k_stride = params.v_stride = {0, seqlen_kv * kDim, kDim};
  }

  static sparse_attn::IndexLists list_every_other(std::vector<int32_t>& counts,
                                                  std::vector<int32_t>& indices, int64_t heads,
                                                  int64_t rows, int64_t values) {
    const int64_t width = (values + 1) / 2;
    counts.assign(heads * rows, static_cast<int32_t>(width));
    for (int64_t i = 0; i < heads * rows * width; ++i) {
      indices.push_back(static_cast<int32_t>(i % width * 2));
    }
    return {counts.data(), indices.data(), 1, heads, rows, width};
  }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::forward(params, isa, parallel);
  }
};

struct Backward : Attention {
  std::vector<float> dout, dlse, dq, dk, dv;

  Backward()
      : Attention("backward", 200, 300),
        dout(random_floats(q.size())),
        dlse(random_floats(lse.size())),
        dq(q.size()),
        dk(k.size()),
        dv(v.size()) {
    results = {&dq, &dk, &dv};
  }

  void run(Isa isa, const Parallel& parallel) override {
    BackwardParams backward;
    static_cast<AttentionParams&>(backward) = params;
    backward.dout = dout.data();
    backward.dout_stride = params.out_stride;
    backward.dlse = dlse.data();
    backward.dq = dq.data();
    backward.dk = dk.data();
    backward.dv = dv.data();
    sparse_attn::cpu::backward(backward, isa, parallel);
  }
};

// Three sequences, the last one of few rows.
struct Varlen : Attention {
  std::vector<int32_t> cu_seqlens_q{0, 100, 150, 152}, cu_seqlens_kv{0, 300, 301, 4301};
  Packing packing;

  explicit Varlen(const char* n = "varlen") : Attention(n, 152, 4301) {
    params.batch = 3;
    params.q_stride = params.out_stride = {0, kDim, kHeads * kDim};
    params.k_stride = params.v_stride = {0, kDim, kKvHeads * kDim};
    packing.cu_seqlens_q = cu_seqlens_q.data();
    packing.cu_seqlens_kv = cu_seqlens_kv.data();
    packing.total_q = 152;
    packing.total_kv = 4301;
    lists.emplace_back("cu_seqlens_q", &cu_seqlens_q);
    lists.emplace_back("cu_seqlens_kv", &cu_seqlens_kv);
  }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::forward_varlen(params, packing, isa, parallel);
  }
};

struct Paged : Varlen {
  static constexpr int64_t kPage = 11, kPages = 391, kMaxPages = 370;
  std::vector<int32_t> seqlens_kv{300, 1, 4000}, block_table;

  Paged() : Varlen("paged") {
    for (int64_t i = 0; i < 3 * kMaxPages; ++i) {
      block_table.push_back(static_cast<int32_t>(i * 7 % kPages));
    }
    params.page_size = kPage;
    params.k_stride.batch = params.v_stride.batch = kPage * kKvHeads * kDim;
    packing.cu_seqlens_kv = nullptr;
    packing.seqlens_kv = seqlens_kv.data();
    packing.block_table = block_table.data();
    packing.max_pages = kMaxPages;
    packing.total_kv = kPages;
    lists.back() = {"seqlens_kv", &seqlens_kv};
    lists.emplace_back("block_table", &block_table);
  }
};

// A search that may name any chunk that exists.
struct InfiniteHip : Call {
  sparse_attn::cpu::InfiniteHipParams params;
  std::vector<float> q, k;
  std::vector<int32_t> listed_counts, listed_indices, counts, indices;

  InfiniteHip()
      : Call("infinite_hip_stage"),
        q(random_floats(kHeads * 100 * kDim)),
        k(random_floats(kKvHeads * 640 * kDim)) {
    lists = {{"counts", &listed_counts}, {"indices", &listed_indices}};
    params.batch = 1;
    params.num_heads = kHeads;
    params.num_kv_heads = kKvHeads;
    params.seqlen_q = 100;
    params.seqlen_kv = 640;
    params.head_dim = kDim;
    params.q = q.data();
    params.k = k.data();
    params.q_stride = {0, 100 * kDim, kDim};
    params.k_stride = {0, 640 * kDim, kDim};
    params.block_q = 32;
    params.parent = 64;
    params.chunk = 16;
    params.slots = params.width = 6;
    const int64_t num_lists = kHeads * params.num_rows();
    params.listed_width = 10;
    for (int64_t i = 0; i < num_lists * 10; ++i) {
      listed_indices.push_back(static_cast<int32_t>(i % 10));
    }
    listed_counts.assign(num_lists, 10);
    params.listed_counts = listed_counts.data();
    params.listed_indices = listed_indices.data();
    counts.resize(num_lists);
    indices.resize(num_lists * params.width);
    params.counts = counts.data();
    params.indices = indices.data();
  }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::infinite_hip_stage(params, isa, parallel);
    for (const int32_t n : counts) {
      if (n < 0 || n > params.width) fail("InfiniteHiP kept too many chunks");
    }
    for (const int32_t i : indices) {
      if (i < 0 || i >= 640 / params.chunk) fail("InfiniteHiP kept a chunk that does not exist");
    }
  }

  bool reads_a_copy() const override { return false; }
};

struct Hip : Call {
  sparse_attn::cpu::HipParams params;
  std::vector<float> q, k;
  std::vector<int32_t> counts, indices;

  Hip()
      : Call("hip_select"),
        q(random_floats(kHeads * 100 * kDim)),
        k(random_floats(kKvHeads * 640 * kDim)),
        counts(kHeads * 4),
        indices(kHeads * 4 * 3) {
    params.batch = 1;
    params.num_heads = kHeads;
    params.num_kv_heads = kKvHeads;
    params.seqlen_q = 100;
    params.seqlen_kv = 640;
    params.head_dim = kDim;
    params.q = q.data();
    params.k = k.data();
    params.q_stride = {0, 100 * kDim, kDim};
    params.k_stride = {0, 640 * kDim, kDim};
    params.block_q = 32;
    params.block_k = 16;
    params.slots = params.width = 3;
    params.counts = counts.data();
    params.indices = indices.data();
  }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::hip_select(params, isa, parallel);
  }
};

struct TopBlocks : Call {
  std::vector<float> scores;
  std::vector<int32_t> counts, indices;

  TopBlocks() : Call("top_blocks"), scores(random_floats(6000 * 20)) {
    counts.resize(6000);
    indices.resize(6000 * 4);
  }

  void run(Isa, const Parallel& parallel) override {
    sparse_attn::cpu::top_blocks({scores.data(), 6000, 20, 4, counts.data(), indices.data()},
                                 parallel);
  }
};

// Calls f(call) for one call of each kind, all large enough for several threads.
void for_each_call(const std::function<void(Call&)>& f) {
  Attention prefill("prefill", 200, 300), small("small prefill", 40, 40), decode("decode", 1, 4301);
  Backward backward;
  Varlen varlen;
  Paged paged;
  InfiniteHip infinite_hip;
  Hip hip;
  TopBlocks top_blocks;
  for (Call* call : std::initializer_list<Call*>{&prefill, &small, &decode, &backward, &varlen,
                                                 &paged, &infinite_hip, &hip, &top_blocks}) {
    f(*call);
  }
}

Parallel at_once(int64_t num_threads) {
  return {num_threads, [num_threads](int64_t n, const std::function<void(int64_t)>& f) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
              for (int64_t i = next++; i < n; i = next++) f(i);
            };
            std::vector<std::thread> others;
            for (int64_t i = 1; i < num_threads; ++i) others.emplace_back(work);
            work();
            for (std::thread& other : others) other.join();
          }};
}

// As in a parallel region within another one. `before` is told how many runs there were.
Parallel one_after_the_other(int64_t num_threads, std::function<void(int64_t)> before = {}) {
  return {num_threads,
          [=, runs = int64_t{0}](int64_t n, const std::function<void(int64_t)>& f) mutable {
            if (before) before(runs++);
            for (int64_t i = n; i-- > 0;) f(i);
          }};
}

std::vector<std::vector<float>> results_of(const Call& call) {
  std::vector<std::vector<float>> results;
  for (const std::vector<float>* result : call.results) results.push_back(*result);
  return results;
}

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

// Overwrites one list before the first, the second, ... time that a call goes parallel.
void check_changed_lists(Isa isa) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  int64_t num_changes = 0;
  for_each_call([&](Call& call) {
    call.run(isa, one_after_the_other(2));
    const auto expected = results_of(call);
    for (const auto& [list_name, list] : call.lists) {
      const std::vector<int32_t> right = *list;
      for (const int32_t wrong : {kMost, -(1 << 30), 1 << 20}) {
        bool changed = true;
        for (int64_t when = 0; changed; ++when) {
          changed = false;
          const auto change = [&, list = list](int64_t runs) {
            if (runs != when) return;
            std::fill(list->begin(), list->end(), wrong);
            changed = true;
          };
          try {
            call.run(isa, one_after_the_other(2, change));
            if (call.reads_a_copy() && results_of(call) != expected) {
              fail(call.name + " read " + list_name + " again after it was checked");
            }
          } catch (const std::invalid_argument&) {
          }
          *list = right;
          num_changes += changed;
        }
      }
    }
  });
  if (num_changes < 100) fail("hardly a call went parallel");
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
    check_changed_lists(isa);
    std::printf("%s: nobody gives way, lists may change\n", isa_name(isa));
  }
  return 0;
}
