// Kernels by dtype.
#pragma once

#include "params.h"

namespace sparse_attn::cpu {

// One instruction set's kernels of a kind; null where it has none of its own.
template <class Kernel>
struct ByDType {
  const Kernel* float32 = nullptr;
  const Kernel* bfloat16 = nullptr;
  const Kernel* float16 = nullptr;

  const Kernel* operator[](DType dtype) const {
    if (dtype == DType::kBFloat16) return bfloat16;
    if (dtype == DType::kFloat16) return float16;
    return float32;
  }
};

}  // namespace sparse_attn::cpu
