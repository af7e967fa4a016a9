// Runs a problem of tests/cpp on the CUDA kernels, in the emulator.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/launch.h"
#include "problem.h"

namespace sparse_attn::testing {

// Rows must begin at multiples of 16 bytes.
inline constexpr int64_t kAlignment = 8;

inline emulator::Report run_emulated(Problem& problem, const emulator::Options& options = {}) {
  problem.describe();
  std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), static_cast<char>(0xff));
  std::fill(problem.lse.begin(), problem.lse.end(), NAN);
  cuda::Emulation emulation;
  emulation.options = options;
  const auto add = [&](auto& x, bool is_writable = false) {
    emulation.memory.add(x.data(), x.size() * sizeof(x[0]), is_writable);
  };
  add(problem.q.bytes);
  add(problem.k.bytes);
  add(problem.v.bytes);
  add(problem.out.bytes, true);
  add(problem.lse, true);
  add(problem.sink);
  add(problem.window);
  add(problem.sinks);
  add(problem.slopes);
  add(problem.bias);
  for (auto* lists : {&problem.blocks, &problem.columns}) {
    add(lists->counts);
    add(lists->indices);
  }
  const char* error = cuda::forward(problem.params, &emulation);
  if (error != nullptr && emulation.report.error.empty()) emulation.report.error = error;
  return emulation.report;
}

// What is wrong with a run, or nothing.
inline std::string fault(Problem& problem, const emulator::Options& options = {}) {
  const emulator::Report report = run_emulated(problem, options);
  return report.error.empty() ? problem.difference() : report.error;
}

}  // namespace sparse_attn::testing
