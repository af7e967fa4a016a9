// What kernels run with: the instruction set that is chosen for the process, and torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"

namespace sparse_attn {

inline std::atomic<cpu::Isa>& active_isa() {
  static std::atomic<cpu::Isa> isa{cpu::best_isa()};
  return isa;
}

inline cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.num_threads = torch::stable::get_num_threads();
  parallel.run = [](int64_t n, const std::function<void(int64_t)>& f) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  };
  return parallel;
}

}  // namespace sparse_attn
