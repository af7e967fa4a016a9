// What the emulator must find, each in a kernel of a few lines, and what it must let pass.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/primitives.h"

namespace sparse_attn::cuda {
namespace {

constexpr int kThreads = 64;
int failures = 0;

struct Data {
  std::vector<int> read_only = std::vector<int>(kThreads, 7), result = std::vector<int>(kThreads);
  Global<const int> in{read_only.data()};
  Global<int> out{result.data()};
  Global<const int> out_to_read{result.data()};
};

struct Shape {
  int64_t blocks = 1;
  int threads = kThreads;
  int64_t shared_bytes = 1024;
  emulator::Options options{};
};

// `expected` is part of the report; empty: nothing may be reported.
void check(const char* name, const char* expected, const std::function<void(Data&)>& kernel,
           Shape shape = {}) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    Data data;
    emulator::Memory memory;
    memory.add(data.read_only.data(), data.read_only.size() * sizeof(int));
    memory.add(data.result.data(), data.result.size() * sizeof(int), true);
    shape.options.seed = seed;
    const emulator::Report report =
        emulator::launch(shape.blocks, shape.threads, shape.shared_bytes, memory, shape.options,
                         [&] { kernel(data); });
    const bool is_right =
        *expected == '\0' ? report.error.empty() : report.error.find(expected) != std::string::npos;
    if (is_right && seed < 5) continue;
    std::printf("%s %s: %s\n", is_right ? "  ok  " : "FAILED", name,
                report.error.empty() ? "nothing to report" : report.error.c_str());
    failures += !is_right;
    return;
  }
}

int thread() { return thread_index(); }
uint32_t own() { return static_cast<uint32_t>(thread()) * 4; }
uint32_t neighbour() { return static_cast<uint32_t>(thread() + 1) % kThreads * 4; }
uint32_t neighbour_in_warp() {
  return static_cast<uint32_t>(thread() / 32 * 32 + (thread() + 1) % 32) * 4;
}

void check_shared_memory() {
  check("exchange in a block", "", [](Data& data) {
    store_shared<int>(own(), thread());
    sync_block();
    store(data.out + thread(), load_shared<int>(neighbour()));
  });
  check("exchange without a barrier", "reads what", [](Data&) {
    store_shared<int>(own(), thread());
    load_shared<int>(neighbour());
  });
  check("overwriting what others may still read", "race", [](Data&) {
    store_shared<int>(own(), thread());
    sync_block();
    load_shared<int>(neighbour());
    store_shared<int>(own(), 0);
  });
  check("exchange in a warp", "", [](Data&) {
    store_shared<int>(own(), thread());
    sync_warp();
    load_shared<int>(neighbour_in_warp());
  });
  check("a barrier of warps for a block", "reads what", [](Data&) {
    store_shared<int>(own(), thread());
    sync_warp();
    load_shared<int>(neighbour());
  });
  check("a shuffle in place of a barrier", "reads what", [](Data&) {
    store_shared<int>(own(), thread());
    shuffle_xor(1.0f, 1);
    load_shared<int>(neighbour_in_warp());
  });
  check("ldmatrix of what its lanes wrote", "", [](Data&) {
    store_shared<Int4>(static_cast<uint32_t>(thread()) * 16, {});
    sync_warp();
    uint32_t r[4];
    load_matrices(r, static_cast<uint32_t>(thread()) * 16);
  });
  check("ldmatrix without a barrier", "race: reads", [](Data&) {
    store_shared<Int4>(static_cast<uint32_t>(thread()) * 16, {});
    uint32_t r[4];
    load_matrices(r, static_cast<uint32_t>(thread()) * 16);
  });
  check("shared memory that nobody wrote", "nobody wrote", [](Data&) { load_shared<int>(own()); });
  check("behind shared memory", "out of bounds at shared byte",
        [](Data&) { store_shared<int>(1024 + own(), 0); });
  check("misaligned", "misaligned", [](Data&) { store_shared<Int4>(own() + 4, {}); });
}

void check_global_memory() {
  check("within a tensor", "",
        [](Data& data) { store(data.out + thread(), load(data.in + thread())); });
  check("behind a tensor", "out of bounds of global memory",
        [](Data& data) { load(data.in + thread() + 1); });
  check("before a tensor", "out of bounds of global memory",
        [](Data& data) { load(data.in + (thread() - 1)); });
  check("writing what is to be read", "read-only",
        [](Data& data) { store(Global<int>(data.read_only.data()) + thread(), 1); });
  Shape two_blocks;
  two_blocks.blocks = 2;
  check(
      "reading what another block wrote", "another block",
      [](Data& data) {
        if (block_index() == 0) store(data.out + thread(), 1);
        if (block_index() == 1) load(data.out_to_read + thread());
      },
      two_blocks);
  check(
      "writing what another block wrote", "another block",
      [](Data& data) { store(data.out + thread(), 1); }, two_blocks);
  Shape few_steps;
  few_steps.options.most_steps = 10000;
  check(
      "waiting for another block", "without end",
      [](Data& data) {
        while (load(data.out_to_read) == 0) {
        }
      },
      few_steps);
}

void check_copies() {
  const auto copy = [](Data& data) {
    copy_async(static_cast<uint32_t>(thread()) * 16, data.in + thread() / 16 * 4, true);
  };
  const auto use = [] { load_shared<Int4>(static_cast<uint32_t>(thread()) * 16); };
  check("a copy that was waited for", "", [=](Data& data) {
    copy(data);
    copy_commit();
    copy_wait<0>();
    use();
  });
  check("a copy that was not waited for", "has not landed", [=](Data& data) {
    copy(data);
    copy_commit();
    use();
  });
  check("a copy that was not committed", "has not landed", [=](Data& data) {
    copy(data);
    copy_wait<0>();
    use();
  });
  check("the last of two groups of copies", "has not landed", [=](Data& data) {
    copy_commit();
    copy(data);
    copy_commit();
    copy_wait<1>();
    use();
  });
  check("overwriting a copy under way", "has not landed", [=](Data& data) {
    copy(data);
    store_shared<Int4>(static_cast<uint32_t>(thread()) * 16, {});
  });
  check("a copy under way at the end", "under way at the end", [=](Data& data) {
    copy(data);
    copy_commit();
  });
  check("a copy from behind a tensor", "out of bounds of global memory", [](Data& data) {
    copy_async(static_cast<uint32_t>(thread()) * 16, data.in + kThreads, true);
  });
  check("a copy of zeros has no source", "", [=](Data& data) {
    copy_async(static_cast<uint32_t>(thread()) * 16, data.in + kThreads, false);
    copy_commit();
    copy_wait<0>();
    use();
  });
}

void check_collectives() {
  check("lanes in different shuffles", "diverged", [](Data&) {
    if (thread() % 32 == 3) {
      shuffle_xor(1.0f, 1);
    } else {
      shuffle_xor(1.0f, 1);
    }
  });
  check("a lane that leaves out a shuffle", "deadlock", [](Data&) {
    if (thread() % 32 != 3) shuffle_xor(1.0f, 1);
  });
  check("half of a warp at a barrier", "deadlock", [](Data&) {
    if (thread() % 32 < 16) {
      sync_block();
    } else {
      sync_warp();
    }
  });
}

void check_launches() {
  const auto nothing = [](Data&) {};
  const auto of = [](int64_t blocks, int threads, int64_t shared_bytes, emulator::Target target) {
    Shape shape{blocks, threads, shared_bytes};
    shape.options.target = target;
    return shape;
  };
  check("an empty grid", "the grid has no such size", nothing, of(0, 64, 0, emulator::kSm80));
  check("part of a warp", "whole warps", nothing, of(1, 48, 0, emulator::kSm80));
  check("160 KB of shared memory", "", nothing, of(1, 64, 160 << 10, emulator::kSm80));
  check("160 KB on a smaller GPU", "too much shared memory", nothing,
        of(1, 64, 160 << 10, emulator::kSm89));
}

int run() {
  check_shared_memory();
  check_global_memory();
  check_copies();
  check_collectives();
  check_launches();
  std::printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace sparse_attn::cuda

int main() { return sparse_attn::cuda::run(); }
