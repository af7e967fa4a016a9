// Which keys a query tile may see: the union of sink, window, blocks and columns.
#pragma once

#include "kernel.h"

namespace sparse_attn::cpu {

struct TileIndex {
  int64_t batch = 0, head = 0, row = 0, rows = 0;
};

struct KeyRange {
  int64_t begin = 0, end = 0;
};

// Candidates among keys [begin, begin + 32): visible to every row, or through the window only.
// Either kind is subject to causality.
struct Candidates {
  int64_t begin = 0;
  uint32_t always = 0, window = 0;

  uint32_t all() const { return always | window; }
};

// Bits 0 ... n - 1.
inline uint32_t low_bits(int64_t n) {
  if (n <= 0) return 0;
  return n >= kGranule ? ~uint32_t{0} : (uint32_t{1} << n) - 1;
}

// Walks the candidates of one tile in ascending order, 32 keys at a time.
class CandidateWalk {
 public:
  CandidateWalk(const AttentionParams& params, const TileIndex& tile);

  // An upper estimate of how many candidates lie before `key`; ascending in `key`.
  int64_t count_below(int64_t key) const;
  int64_t rows() const { return rows_; }
  // No candidate lies at or after it.
  int64_t limit() const { return limit_; }

  // Limits the walk to a range that begins at a multiple of 32.
  void restrict_to(const KeyRange& range);
  bool next(Candidates& found);

  // Whether every row sees a run of candidates, some of them through the window only.
  bool seen_by_all_rows(const KeyRange& run, bool in_window) const;
  // Bit j of word r: row r of the tile sees the key at positions[j], which are at most 32
  // candidates in ascending order.
  void row_masks(const int32_t* positions, int count, uint32_t always, uint32_t window,
                 uint32_t* masks) const;
  // No row sees less than all of its candidates up to this key by causality.
  int64_t first_position() const { return first_position_; }

 private:
  KeyRange block_range(int64_t i) const;

  const AttentionParams& params_;
  int64_t rows_, first_position_, limit_, window_size_;
  KeyRange always_, window_;
  const int32_t* blocks_ = nullptr;
  int64_t num_blocks_ = 0, next_block_ = 0, block_resume_ = 0;
  const int32_t* columns_ = nullptr;
  int64_t num_columns_ = 0, next_column_ = 0;
};

}  // namespace sparse_attn::cpu
