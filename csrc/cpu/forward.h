// The entry point of the CPU kernels.
#pragma once

#include <functional>

#include "../params.h"
#include "isa.h"

namespace sparse_attn::cpu {

// How the caller runs work in parallel: run(n, f) calls f(0) ... f(n - 1), possibly at once.
struct Parallel {
  int64_t num_threads = 1;
  std::function<void(int64_t, const std::function<void(int64_t)>&)> run;
};

// Computes out and lse of one call with kernels of at most the given instruction set.
// Throws std::invalid_argument when the layout is not well formed, before any key is read.
void forward(const AttentionParams& params, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
