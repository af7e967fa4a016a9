// Attention of sequences of different lengths, in packed tensors or a paged cache.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// Where the sequences lie. Other threads may write into these tensors while a call runs.
struct Packing {
  const int32_t* cu_seqlens_q = nullptr;   // [batch + 1]
  const int32_t* cu_seqlens_kv = nullptr;  // [batch + 1], or null where keys lie in pages
  const int32_t* seqlens_kv = nullptr;     // [batch], with pages
  const int32_t* block_table = nullptr;    // [batch, max_pages], with pages
  int64_t max_pages = 0;
  int64_t total_q = 0;
  int64_t total_kv = 0;  // rows of k, or pages

  bool is_paged() const { return cu_seqlens_kv == nullptr; }
};

// Computes out and lse of a batch of sequences. `greatest` describes the tensors as they are, and
// the layout made for the greatest lengths, which are its seqlens; each sequence reads its own
// entries of the layout.
// Throws std::invalid_argument when a value is not right, before any key is read.
void forward_varlen(const ForwardParams& greatest, const Packing& packing, Isa isa,
                    const Parallel& parallel);

}  // namespace sparse_attn::cpu
