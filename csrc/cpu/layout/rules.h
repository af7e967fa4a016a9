// The rules of the layout: which keys rows see. Everything that reads a layout asks here.
#pragma once

#include <algorithm>

#include "params.h"

namespace sparse_attn::cpu {

// Consecutive rows of one head.
struct TileIndex {
  int64_t batch = 0, head = 0, row = 0, rows = 0;
};

struct KeyRange {
  int64_t begin = 0, end = 0;
};

// Rows from a multiple of so many on share all index lists.
int64_t list_rows(const AttentionParams& params);

// Calls f(row, rows) for each run of rows among [begin, end) that share all index lists.
template <class F>
void for_each_run(const AttentionParams& params, int64_t begin, int64_t end, F f) {
  const int64_t unit = list_rows(params);
  for (int64_t row = begin; row < end;) {
    const int64_t stop = std::min(end, (row / unit + 1) * unit);
    f(row, stop - row);
    row = stop;
  }
}

// Whether rows of two heads see the same keys.
bool have_same_rules(const AttentionParams& params, int64_t head, int64_t other);

// Ascending blocks or keys.
struct IndexList {
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;

  bool empty() const { return begin == end; }
  const int32_t* lower_bound(int64_t value) const { return std::lower_bound(begin, end, value); }
};

// The rules for a run of rows that share all index lists. Row i of the sequence stands at position
// i + seqlen_kv - seqlen_q. It sees the union of sink, window, blocks and columns, as far as
// causality lets it.
class Rules {
 public:
  Rules(const AttentionParams& params, const TileIndex& run);

  int64_t rows() const { return rows_; }
  int64_t first_position() const { return first_; }
  int64_t last_position() const { return first_ + rows_ - 1; }

  // No row up to position p sees a key from here on.
  int64_t key_limit(int64_t p) const {
    return params_.is_causal ? std::min(params_.seqlen_kv, p + 1) : params_.seqlen_kv;
  }
  int64_t limit() const { return key_limit(last_position()); }

  // The keys that every row sees through the sink, or as its window has no limit.
  int64_t sink() const { return sink_; }
  const IndexList& blocks() const { return blocks_; }
  const IndexList& columns() const { return columns_; }
  int64_t block_size() const { return params_.block_kv; }
  KeyRange block(int64_t index) const {
    return {index * params_.block_kv, (index + 1) * params_.block_kv};
  }

  // The window of the row at position p, which may reach beyond the keys.
  bool has_window() const { return window_ > 0; }
  KeyRange window_at(int64_t p) const { return {p - window_ + 1, p + window_}; }
  // The keys that lie in the window of any row.
  KeyRange window() const;
  // Whether all the keys lie in the windows of all rows.
  bool all_windows_hold(const KeyRange& keys) const {
    return last_position() - keys.begin < window_ && keys.end - 1 - first_ < window_;
  }

  // Whether causality hides the key from none of the rows.
  bool all_rows_reach(int64_t key) const { return !params_.is_causal || key <= first_; }
  // Whether all rows see the keys, which are candidates, some of them through the window only.
  bool all_rows_see(const KeyRange& keys, bool in_window) const {
    return all_rows_reach(keys.end - 1) && (!in_window || all_windows_hold(keys));
  }

  // Bit j of word r: row r sees the key at positions[j], which are at most 32 candidates in
  // ascending order: for all rows, or through the window only.
  void row_masks(const int32_t* positions, int count, uint32_t always, uint32_t window,
                 uint32_t* masks) const;
  // Word r: the keys from `first_key` on that row r sees, of which some are listed.
  void row_words(int64_t first_key, uint32_t listed, uint32_t* words) const;
  // Whether row r sees any key.
  bool row_sees(int64_t r) const;

 private:
  const AttentionParams& params_;
  int64_t rows_, first_, window_, sink_;
  IndexList blocks_, columns_;
};

}  // namespace sparse_attn::cpu
