#include "cpu/layout/candidates.h"

#include <algorithm>

namespace sparse_attn::cpu {

namespace {

int64_t overlap(const KeyRange& range, int64_t end) {
  return std::max<int64_t>(0, std::min(range.end, end) - range.begin);
}

}  // namespace

CandidateWalk::CandidateWalk(const AttentionParams& params, const TileIndex& tile)
    : rules_(params, tile),
      limit_(rules_.limit()),
      always_{0, std::min(rules_.sink(), limit_)},
      window_(rules_.window()),
      blocks_(rules_.blocks()),
      columns_(rules_.columns()) {}

int64_t CandidateWalk::count_below(int64_t key) const {
  key = std::min(key, limit_);
  int64_t count = overlap(always_, key) + overlap(window_, key);
  const int64_t size = rules_.block_size(), block = (key + size - 1) / size;
  count += (blocks_.lower_bound(block) - blocks_.begin) * size;
  count += columns_.lower_bound(key) - columns_.begin;
  return std::clamp<int64_t>(count, 0, std::max<int64_t>(key, 0));
}

void CandidateWalk::restrict_to(const KeyRange& range) {
  limit_ = std::min(limit_, range.end);
  always_.begin = std::max(always_.begin, range.begin);
  window_.begin = std::max(window_.begin, range.begin);
  blocks_.begin = blocks_.lower_bound(range.begin / rules_.block_size());
  block_resume_ = range.begin;
  columns_.begin = columns_.lower_bound(range.begin);
}

// What is left of the first block that is left.
KeyRange CandidateWalk::next_block() const {
  const KeyRange block = rules_.block(*blocks_.begin);
  return {std::max(block.begin, block_resume_), std::min(block.end, limit_)};
}

bool CandidateWalk::next(Candidates& found) {
  int64_t first = limit_;
  if (always_.begin < always_.end) first = std::min(first, always_.begin);
  if (window_.begin < window_.end) first = std::min(first, window_.begin);
  if (!blocks_.empty()) first = std::min(first, next_block().begin);
  if (!columns_.empty()) first = std::min<int64_t>(first, *columns_.begin);
  if (first >= limit_) return false;

  const int64_t begin = first / kGranule * kGranule, end = begin + kGranule;
  uint32_t always = range_bits(always_.begin, always_.end, begin);
  always_.begin = std::max(always_.begin, end);
  uint32_t window = range_bits(window_.begin, window_.end, begin);
  window_.begin = std::max(window_.begin, end);
  for (; !blocks_.empty(); ++blocks_.begin) {
    const KeyRange block = next_block();
    if (block.begin >= end) break;
    always |= range_bits(block.begin, block.end, begin);
    if (block.end > end) {
      block_resume_ = end;
      break;
    }
  }
  for (; !columns_.empty() && *columns_.begin < end; ++columns_.begin) {
    always |= uint32_t{1} << (*columns_.begin - begin);
  }
  found.begin = begin;
  found.always = always & low_bits(limit_ - begin);
  found.window = window & ~found.always;
  return true;
}

}  // namespace sparse_attn::cpu
