// The untrusted layout tensors: what is checked is a copy, and the kernels read that copy.
#pragma once

#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// The copy lies in memory of the calling thread, and lasts as long as this object.
class CheckedLayout {
 public:
  // Lets `params` refer to a copy of its layout, which stays as it was checked, whatever other
  // threads write into the tensors. Lists are as wide there as the longest.
  // Throws std::invalid_argument naming the tensor and a bad entry.
  CheckedLayout(AttentionParams& params, const Parallel& parallel);
  ~CheckedLayout();
  CheckedLayout(const CheckedLayout&) = delete;
  CheckedLayout& operator=(const CheckedLayout&) = delete;
};

}  // namespace sparse_attn::cpu
