// The gradients of key_bias and alibi_slopes, put together from those of each query head.
#pragma once

#include <vector>

#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

class BiasGradients {
 public:
  BiasGradients(const BackwardParams& params, int64_t key_tiles);

  // What the rows of a query head, counted over the whole batch, give for the keys [first_key,
  // first_key + keys) and for the head's slope. No two threads give the same key tile of a head.
  void set(int64_t head, int64_t first_key, int64_t keys, const double* dbias, double dslope);
  // Forgets what all key tiles gave for the head.
  void clear(int64_t head);
  // Writes the sums over the heads and the batch entries that share a number, in their order.
  void write(const Parallel& parallel) const;

 private:
  const BackwardParams& params_;
  int64_t key_tiles_;
  std::vector<float> by_key_;    // [batch * num_heads, seqlen_kv]
  std::vector<double> by_tile_;  // [batch * num_heads, key_tiles], of slopes
};

}  // namespace sparse_attn::cpu
