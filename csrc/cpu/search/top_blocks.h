// The blocks of the highest scores.
#pragma once

#include "cpu/runtime/parallel.h"

namespace sparse_attn::cpu {

struct TopBlocksParams {
  const float* scores = nullptr;  // [rows, blocks]
  int64_t rows = 0, blocks = 0;
  int64_t top_k = 1;  // at most `blocks`

  int32_t* counts = nullptr;   // [rows]
  int32_t* indices = nullptr;  // [rows, top_k], ascending; behind the count they are `blocks`
};

// Keeps the top_k blocks of each row; of equal scores the earlier one, never one of -inf or NaN.
void top_blocks(const TopBlocksParams& params, const Parallel& threads);

}  // namespace sparse_attn::cpu
