// Threads of the caller.
#pragma once

#include <cstdint>
#include <functional>

namespace sparse_attn::cpu {

// How the caller runs work in parallel: run(n, f) calls f(0) ... f(n - 1), possibly at once.
struct Parallel {
  int64_t num_threads = 1;
  std::function<void(int64_t, const std::function<void(int64_t)>&)> run;
};

}  // namespace sparse_attn::cpu
