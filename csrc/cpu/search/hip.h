// The tree search of HiP: which key blocks each query block attends to.
#pragma once

#include <cstddef>

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "integers.h"
#include "params.h"

namespace sparse_attn::cpu {

struct HipParams : QkParams {
  int64_t slots = 1;                   // blocks to find
  int64_t block_q = 1, block_k = 1;    // rows and keys in a block
  int64_t stride_q = 1, stride_k = 1;  // of the sampled rows and keys
  int64_t representatives = 2;         // blocks that judge a node: its centre, and its first
  int64_t sink = 0, window = 0;        // tokens that need no search
  bool strict = false;                 // only the first row is sampled
  bool is_causal = true;

  int32_t* counts = nullptr;   // [batch, num_heads, num_rows()]
  int32_t* indices = nullptr;  // [batch, num_heads, num_rows(), width]
  int64_t width = 0;

  int64_t num_rows() const { return ceil_div(seqlen_q, block_q); }
};

void hip_select(const HipParams& params, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
