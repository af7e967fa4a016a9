// Attention of few query rows: each key is read once, as it lies in memory, for all rows and heads
// that share its KV head and their list of keys.
#pragma once

#include <span>

#include "candidates.h"
#include "forward.h"

namespace sparse_attn::cpu {

inline constexpr int64_t kMostDecodeQueries = 16;
inline constexpr int64_t kMostDecodeRows = 64;
inline constexpr int kBatchKeys = 64;

// Rows of some heads of one KV head that share one list of candidate keys. Row r of the tile is
// row r % queries of head r / queries.
struct DecodeTile {
  const void* q = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int64_t q_head_stride = 0, q_row_stride = 0;
  int64_t out_head_stride = 0, out_row_stride = 0;
  int64_t lse_head_stride = 0;
  int64_t heads = 0, queries = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  float scale = 1.0f;
  float softcap = 0.0f;
  const float* sink_logits = nullptr;  // [heads]

  int64_t rows() const { return heads * queries; }
};

// Some keys of a tile, given by pointers to their first elements. Whole vectors of pointers may be
// read: those after `count` repeat the last key.
struct KeyBatch {
  int count = 0;
  const void* k[kBatchKeys];
  const void* v[kBatchKeys];
  uint64_t visible[kMostDecodeQueries];  // bit j: whether the query sees key j
};

// Hands out the keys of one tile in a range of positions.
class DecodeKeys {
 public:
  DecodeKeys(const AttentionParams& params, const CandidateWalk& walk, int64_t batch,
             int64_t kv_head, int64_t queries);

  void next(KeyBatch& batch);  // an empty batch at the end

 private:
  void append(const Candidates& found, KeyBatch& batch);
  void append_from_pages(const Candidates& found, KeyBatch& batch);

  const AttentionParams& params_;
  CandidateWalk walk_;
  int64_t queries_;
  const std::byte* k_;
  const std::byte* v_;
  int64_t k_row_bytes_, v_row_bytes_;
  int64_t page_begin_ = 0, page_end_ = 0;  // the keys of the page that was used last
  const std::byte* k_page_ = nullptr;
  const std::byte* v_page_ = nullptr;
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

bool is_decode(const AttentionParams& params, Isa isa);

// Whether scale and softcap are so far from the ends of float32 that scores need no care.
inline bool has_ordinary_scale(const AttentionParams& params) {
  constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;
  const auto is_ordinary = [](float x) { return x >= kLeast && x <= kMost; };
  const float scale = params.scale < 0 ? -params.scale : params.scale;
  if (scale == 0) return params.softcap == 0 || is_ordinary(params.softcap);
  return is_ordinary(scale) && (params.softcap == 0 || is_ordinary(scale / params.softcap));
}

// Computes out and lse of one row, given by its place, reading the keys that it sees and no others.
void decode_row(const ForwardParams& params, const TileIndex& row, Isa isa);

// Computes out and lse of calls whose layouts have been checked. The result does not depend on the
// number of threads.
void decode(std::span<const ForwardParams> calls, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
