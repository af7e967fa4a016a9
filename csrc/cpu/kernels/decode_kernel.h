// What the kernel for few query rows offers.
#pragma once

#include "cpu/kernels/decode_keys.h"

namespace sparse_attn::cpu {

inline constexpr int64_t kMostDecodeRows = 64;

// Rows of some heads of one KV head that share one list of candidate keys. Row r of the tile is
// row r % queries of head r / queries.
struct DecodeTile : ScoreParams {
  const void* q = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int64_t q_head_stride = 0, q_row_stride = 0;
  int64_t out_head_stride = 0, out_row_stride = 0;
  int64_t lse_head_stride = 0;
  int64_t heads = 0, queries = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  const float* sink_logits = nullptr;  // [heads]

  int64_t rows() const { return heads * queries; }
};

// A state is what attention over some of the keys amounts to: for each row the running maximum, the
// running sum, and the accumulator.
inline int64_t state_dims(int64_t head_dim_v) { return (head_dim_v + 15) / 16 * 16; }
inline int64_t state_floats(int64_t rows, int64_t head_dim_v) {
  return rows * state_dims(head_dim_v) + (2 * rows + 15) / 16 * 16;
}

struct DecodeKernel {
  int64_t (*scratch_bytes)(int64_t rows, int64_t head_dim) = nullptr;
  void (*run)(const DecodeTile& tile, DecodeKeys& keys, float* state, std::byte* scratch) = nullptr;
  // Joins states in their order and writes out and lse. Returns the rows, as bits, with sums that
  // are not finite: in a tile of several queries, keys that a row does not see may be the cause.
  uint64_t (*finish)(const DecodeTile& tile, const float* states, int64_t num_states) = nullptr;
  uint32_t (*enter)() = nullptr;
  void (*leave)(uint32_t saved) = nullptr;
};

}  // namespace sparse_attn::cpu
