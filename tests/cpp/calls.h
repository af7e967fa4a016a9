// A call of every kind, small and with all its lists, and ways to run the threads of a call.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/backward/backward.h"
#include "cpu/forward/forward.h"
#include "cpu/forward/varlen.h"
#include "cpu/search/hip.h"
#include "cpu/search/infinite_hip.h"
#include "cpu/search/top_blocks.h"

using sparse_attn::AttentionParams;
using sparse_attn::BackwardParams;
using sparse_attn::ForwardParams;
using sparse_attn::cpu::Isa;
using sparse_attn::cpu::Packing;
using sparse_attn::cpu::Parallel;

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

inline std::vector<float> random_floats(int64_t n) {
  static std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& x : values) x = normal(generator);
  return values;
}

// `lists` are what other threads may change, `results` must not depend on that.
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
  ForwardParams params;
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
    backward.out = params.out;
    backward.out_stride = params.out_stride;
    backward.lse = params.lse;
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

// 100 rows in blocks of 32 search 640 keys.
template <class Params>
struct Search : Call {
  static constexpr int64_t kRows = 100, kKeys = 640;
  Params params;
  std::vector<float> q, k;
  std::vector<int32_t> counts, indices;

  Search(const char* n, int64_t slots)
      : Call(n),
        q(random_floats(kHeads * kRows * kDim)),
        k(random_floats(kKvHeads * kKeys * kDim)) {
    params.batch = 1;
    params.num_heads = kHeads;
    params.num_kv_heads = kKvHeads;
    params.seqlen_q = kRows;
    params.seqlen_kv = kKeys;
    params.head_dim = kDim;
    params.q = q.data();
    params.k = k.data();
    params.q_stride = {0, kRows * kDim, kDim};
    params.k_stride = {0, kKeys * kDim, kDim};
    params.block_q = kBlock;
    params.slots = params.width = slots;
    counts.resize(kHeads * params.num_rows());
    indices.resize(counts.size() * slots);
    params.counts = counts.data();
    params.indices = indices.data();
  }
};

struct Hip : Search<sparse_attn::cpu::HipParams> {
  Hip() : Search("hip_select", 3) { params.block_k = 16; }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::hip_select(params, isa, parallel);
  }
};

// A list that changes may name any chunk that exists.
struct InfiniteHip : Search<sparse_attn::cpu::InfiniteHipParams> {
  std::vector<int32_t> listed_counts, listed_indices;

  InfiniteHip() : Search("infinite_hip_stage", 6) {
    lists = {{"counts", &listed_counts}, {"indices", &listed_indices}};
    params.parent = 64;
    params.chunk = 16;
    params.listed_width = kKeys / params.parent;
    listed_counts.assign(counts.size(), static_cast<int32_t>(params.listed_width));
    for (size_t i = 0; i < counts.size() * params.listed_width; ++i) {
      listed_indices.push_back(static_cast<int32_t>(i % params.listed_width));
    }
    params.listed_counts = listed_counts.data();
    params.listed_indices = listed_indices.data();
  }

  void run(Isa isa, const Parallel& parallel) override {
    sparse_attn::cpu::infinite_hip_stage(params, isa, parallel);
    for (const int32_t n : counts) {
      if (n < 0 || n > params.width) fail("InfiniteHiP kept too many chunks");
    }
    for (const int32_t i : indices) {
      if (i < 0 || i >= kKeys / params.chunk) fail("InfiniteHiP kept a chunk that does not exist");
    }
  }

  bool reads_a_copy() const override { return false; }
};

struct TopBlocks : Call {
  static constexpr int64_t kRows = 6000, kBlocks = 20, kTop = 4;
  std::vector<float> scores = random_floats(kRows * kBlocks);
  std::vector<int32_t> counts = std::vector<int32_t>(kRows);
  std::vector<int32_t> indices = std::vector<int32_t>(kRows * kTop);

  TopBlocks() : Call("top_blocks") {}

  void run(Isa, const Parallel& parallel) override {
    sparse_attn::cpu::top_blocks(
        {scores.data(), kRows, kBlocks, kTop, counts.data(), indices.data()}, parallel);
  }
};

// Calls f(call) for one call of each kind; all but the small one are worth several threads.
inline void for_each_call(const std::function<void(Call&)>& f) {
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

inline Parallel at_once(int64_t num_threads) {
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
inline Parallel one_after_the_other(int64_t num_threads, std::function<void(int64_t)> before = {}) {
  return {num_threads,
          [=, runs = int64_t{0}](int64_t n, const std::function<void(int64_t)>& f) mutable {
            if (before) before(runs++);
            for (int64_t i = n; i-- > 0;) f(i);
          }};
}
