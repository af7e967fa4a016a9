// One stage of InfiniteHiP: which chunks of keys each query block keeps.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "integers.h"
#include "params.h"

namespace sparse_attn::cpu {

struct InfiniteHipParams : QkParams {
  // Candidates are the parts of `chunk` keys of the listed chunks of `parent` keys, or without
  // lists all that begin before the last `window` keys. Chunks are counted from key `sink` on. The
  // rows of the lists are query blocks, and an index out of range is no candidate.
  const int32_t* listed_counts = nullptr;   // [batch, groups(), num_rows()]
  const int32_t* listed_indices = nullptr;  // [batch, groups(), num_rows(), listed_width]
  int64_t listed_width = 0;
  int64_t parent = 1, chunk = 1;
  int64_t slots = 1;     // chunks to keep
  int64_t stride_q = 1;  // rows of which the mean is a query
  int64_t block_q = 1;
  int64_t sink = 0, window = 0;
  int64_t behind = 0;   // chunks nearer to a block's first row are not searched, nor the last keys
  bool shared = false;  // one list for all heads
  bool is_causal = true;

  int32_t* counts = nullptr;   // [batch, groups(), num_rows()]
  int32_t* indices = nullptr;  // [batch, groups(), num_rows(), width]
  int64_t width = 0;

  int64_t num_rows() const { return ceil_div(seqlen_q, block_q); }
  int64_t groups() const { return shared ? 1 : num_heads; }
};

void infinite_hip_stage(const InfiniteHipParams& params, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
