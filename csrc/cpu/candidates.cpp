#include "candidates.h"

#include <algorithm>

namespace sparse_attn::cpu {

namespace {

constexpr uint32_t kAll = ~uint32_t{0};

int32_t per_head(const PerHead& values, int64_t head, int64_t num_heads) {
  return values.data[head / (num_heads / values.heads)];
}

struct List {
  const int32_t* indices = nullptr;
  int64_t count = 0;
};

List find_list(const IndexLists& lists, const AttentionParams& params, const TileIndex& tile,
               int64_t rows_per_list) {
  if (!lists.present()) return {};
  const int64_t batch = lists.batch == 1 ? 0 : tile.batch;
  const int64_t head = tile.head / (params.num_heads / lists.heads);
  const int64_t row = (batch * lists.heads + head) * lists.rows + tile.row / rows_per_list;
  return {lists.indices + row * lists.width, lists.counts[row]};
}

// The keys of [begin, end) among the 32 keys from `origin` on.
uint32_t range_bits(int64_t begin, int64_t end, int64_t origin) {
  return low_bits(end - origin) & ~low_bits(begin - origin);
}

int64_t overlap(const KeyRange& range, int64_t end) {
  return std::max<int64_t>(0, std::min(range.end, end) - range.begin);
}

}  // namespace

CandidateWalk::CandidateWalk(const AttentionParams& params, const TileIndex& tile)
    : params_(params),
      rows_(tile.rows),
      first_position_(tile.row + params.seqlen_kv - params.seqlen_q) {
  const int64_t last_position = first_position_ + rows_ - 1;
  limit_ = params.is_causal ? std::min(params.seqlen_kv, last_position + 1) : params.seqlen_kv;
  window_size_ = per_head(params.window, tile.head, params.num_heads);
  always_.end = window_size_ < 0 ? limit_ : per_head(params.sink, tile.head, params.num_heads);
  always_.end = std::min(always_.end, limit_);
  if (window_size_ > 0) {
    window_.begin = std::max<int64_t>(0, first_position_ - window_size_ + 1);
    window_.end = std::min(limit_, last_position + window_size_);
  }
  if (window_size_ >= 0) {
    const List blocks = find_list(params.blocks, params, tile, params.block_q);
    blocks_ = blocks.indices;
    num_blocks_ = blocks.count;
    const List columns =
        find_list(params.columns, params, tile, params.block_q * params.column_group);
    columns_ = columns.indices;
    num_columns_ = columns.count;
  }
}

int64_t CandidateWalk::count_below(int64_t key) const {
  key = std::min(key, limit_);
  int64_t count = overlap(always_, key) + overlap(window_, key);
  const int64_t block = (key + params_.block_kv - 1) / params_.block_kv;
  count += (std::lower_bound(blocks_, blocks_ + num_blocks_, block) - blocks_) * params_.block_kv;
  count += std::lower_bound(columns_, columns_ + num_columns_, key) - columns_;
  return std::clamp<int64_t>(count, 0, std::max<int64_t>(key, 0));
}

void CandidateWalk::restrict_to(const KeyRange& range) {
  limit_ = std::min(limit_, range.end);
  always_.begin = std::max(always_.begin, range.begin);
  window_.begin = std::max(window_.begin, range.begin);
  const int64_t block = range.begin / params_.block_kv;
  next_block_ = std::lower_bound(blocks_, blocks_ + num_blocks_, block) - blocks_;
  block_resume_ = range.begin;
  next_column_ = std::lower_bound(columns_, columns_ + num_columns_, range.begin) - columns_;
}

KeyRange CandidateWalk::block_range(int64_t i) const {
  const int64_t begin = blocks_[i] * params_.block_kv;
  return {std::max(begin, block_resume_), std::min(begin + params_.block_kv, limit_)};
}

bool CandidateWalk::next(Candidates& found) {
  int64_t first = limit_;
  if (always_.begin < always_.end) first = std::min(first, always_.begin);
  if (window_.begin < window_.end) first = std::min(first, window_.begin);
  if (next_block_ < num_blocks_) first = std::min(first, block_range(next_block_).begin);
  if (next_column_ < num_columns_) first = std::min<int64_t>(first, columns_[next_column_]);
  if (first >= limit_) return false;

  const int64_t begin = first / kGranule * kGranule, end = begin + kGranule;
  uint32_t always = range_bits(always_.begin, always_.end, begin);
  always_.begin = std::max(always_.begin, end);
  uint32_t window = range_bits(window_.begin, window_.end, begin);
  window_.begin = std::max(window_.begin, end);
  for (; next_block_ < num_blocks_; ++next_block_) {
    const KeyRange block = block_range(next_block_);
    if (block.begin >= end) break;
    always |= range_bits(block.begin, block.end, begin);
    if (block.end > end) {
      block_resume_ = end;
      break;
    }
  }
  for (; next_column_ < num_columns_ && columns_[next_column_] < end; ++next_column_) {
    always |= uint32_t{1} << (columns_[next_column_] - begin);
  }
  found.begin = begin;
  found.always = always & low_bits(limit_ - begin);
  found.window = window & ~found.always;
  return true;
}

bool CandidateWalk::seen_by_all_rows(const KeyRange& run, bool in_window) const {
  const int64_t last_position = first_position_ + rows_ - 1;
  if (params_.is_causal && run.end - 1 > first_position_) return false;
  if (!in_window) return true;
  return last_position - run.begin < window_size_ && run.end - 1 - first_position_ < window_size_;
}

void CandidateWalk::row_masks(const int32_t* positions, int count, uint32_t always, uint32_t window,
                              uint32_t* masks) const {
  int num_causal = params_.is_causal ? 0 : count, num_before = 0, num_until = 0;
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t p = first_position_ + r;
    while (num_causal < count && positions[num_causal] <= p) ++num_causal;
    const uint32_t causal = low_bits(num_causal);
    masks[r] = always & causal;
    if (window == 0) continue;
    while (num_before < count && positions[num_before] <= p - window_size_) ++num_before;
    while (num_until < count && positions[num_until] < p + window_size_) ++num_until;
    masks[r] |= window & causal & low_bits(num_until) & ~low_bits(num_before);
  }
}

}  // namespace sparse_attn::cpu
