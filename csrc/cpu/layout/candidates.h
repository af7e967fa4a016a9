// Which keys a query tile may see: the union of sink, window, blocks and columns.
#pragma once

#include "cpu/layout/granule.h"
#include "cpu/layout/rules.h"

namespace sparse_attn::cpu {

// Candidates among keys [begin, begin + 32): visible to every row, or through the window only.
// Either kind is subject to causality.
struct Candidates {
  int64_t begin = 0;
  uint32_t always = 0, window = 0;

  uint32_t all() const { return always | window; }
};

// Walks the candidates of one tile in ascending order, 32 keys at a time.
class CandidateWalk {
 public:
  CandidateWalk(const AttentionParams& params, const TileIndex& tile);

  const Rules& rules() const { return rules_; }
  // An upper estimate of how many candidates lie before `key`; ascending in `key`.
  int64_t count_below(int64_t key) const;
  // No candidate lies at or after it.
  int64_t limit() const { return limit_; }

  // Limits the walk to a range that begins at a multiple of 32.
  void restrict_to(const KeyRange& range);
  bool next(Candidates& found);

 private:
  KeyRange next_block() const;

  Rules rules_;
  int64_t limit_;
  // What is left.
  KeyRange always_, window_;
  IndexList blocks_, columns_;
  int64_t block_resume_ = 0;
};

}  // namespace sparse_attn::cpu
