// Checks of the untrusted layout tensors.
#pragma once

#include "forward.h"

namespace sparse_attn::cpu {

// Throws std::invalid_argument naming the tensor and the first bad entry.
void check_layout(const AttentionParams& params, const Parallel& parallel);

}  // namespace sparse_attn::cpu
