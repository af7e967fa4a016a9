// The keys of few query rows, handed out as pointers to rows in memory.
#pragma once

#include "cpu/layout/biases.h"
#include "cpu/layout/candidates.h"

namespace sparse_attn::cpu {

inline constexpr int64_t kMostDecodeQueries = 16;
inline constexpr int kBatchKeys = 64;

// Some keys of a tile, given by pointers to their first elements. Whole vectors of pointers may be
// read: those after `count` repeat the last key.
struct KeyBatch {
  int count = 0;
  const void* k[kBatchKeys];
  const void* v[kBatchKeys];
  uint64_t visible[kMostDecodeQueries];  // bit j: whether the query sees key j
  int32_t positions[kBatchKeys];         // if the keys are biased
};

// Hands out the keys of one tile in a range of positions.
class DecodeKeys {
 public:
  DecodeKeys(const AttentionParams& params, const CandidateWalk& walk, const TileIndex& tile,
             int64_t kv_head);

  void next(KeyBatch& batch);  // an empty batch at the end

  // Whether anything is added to scores, and that for the i-th head of the tile.
  bool is_biased() const { return params_.is_biased(); }
  void describe(const KeyBatch& batch, int64_t i, KeyTerms<kBatchKeys>& terms) const;

 private:
  void append(const Candidates& found, KeyBatch& batch);
  void append_from_pages(const Candidates& found, KeyBatch& batch);
  void append_positions(const Candidates& found, KeyBatch& batch) const;

  const AttentionParams& params_;
  CandidateWalk walk_;
  TileIndex tile_;
  const std::byte* k_;
  const std::byte* v_;
  int64_t k_row_bytes_, v_row_bytes_;
  int64_t page_begin_ = 0, page_end_ = 0;  // the keys of the page that was used last
  const std::byte* k_page_ = nullptr;
  const std::byte* v_page_ = nullptr;
};

}  // namespace sparse_attn::cpu
