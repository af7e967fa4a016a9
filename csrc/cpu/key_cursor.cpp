#include "key_cursor.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace sparse_attn::cpu {

namespace {

constexpr uint32_t kAll = ~uint32_t{0};

alignas(64) const std::byte kZeroRow[kMaxHeadDim * sizeof(float)] = {};

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

// Bits 0 ... n - 1.
uint32_t low_bits(int64_t n) {
  if (n <= 0) return 0;
  return n >= kGranule ? kAll : (uint32_t{1} << n) - 1;
}

// The keys of [begin, end) among the 32 keys from `origin` on.
uint32_t range_bits(int64_t begin, int64_t end, int64_t origin) {
  return low_bits(end - origin) & ~low_bits(begin - origin);
}

// Copies one half of the keys of a granule of `bytes` to one half of another.
void copy_half(const std::byte* source, int from, std::byte* dest, int to, int64_t bytes,
               int64_t period) {
  if (period == 0) period = bytes;
  const int64_t run = period / 2;
  for (int64_t start = 0; start < bytes; start += period) {
    std::memcpy(dest + start + to * run, source + start + from * run, run);
  }
}

}  // namespace

int64_t candidate_estimate(const AttentionParams& params, const TileIndex& tile) {
  const int64_t last = tile.row + tile.rows + params.seqlen_kv - params.seqlen_q;
  const int64_t limit = params.is_causal ? std::min(params.seqlen_kv, last) : params.seqlen_kv;
  const int64_t window = per_head(params.window, tile.head, params.num_heads);
  if (window < 0) return std::max<int64_t>(limit, 0);
  int64_t keys = per_head(params.sink, tile.head, params.num_heads);
  if (window > 0) keys += tile.rows - 1 + (params.is_causal ? window : 2 * window - 1);
  keys += find_list(params.blocks, params, tile, params.block_q).count * params.block_kv;
  keys += find_list(params.columns, params, tile, params.block_q * params.column_group).count;
  return std::clamp<int64_t>(keys, 0, std::max<int64_t>(limit, 0));
}

KeyCursor::KeyCursor(const AttentionParams& params, const TileKernel& kernel, const TileIndex& tile,
                     const KeySource& source, std::byte* scratch)
    : params_(params),
      kernel_(kernel),
      source_(source),
      rows_(tile.rows),
      first_position_(tile.row + params.seqlen_kv - params.seqlen_q),
      k_bytes_(kernel.k_granule_bytes(params.head_dim)),
      v_bytes_(kernel.v_granule_bytes(params.head_dim_v)) {
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
  packed_scratch_ = scratch;
  mask_scratch_ =
      reinterpret_cast<uint32_t*>(scratch + 2 * kernel.granules_per_step * (k_bytes_ + v_bytes_));
}

int64_t KeyCursor::scratch_bytes(const AttentionParams& params, const TileKernel& kernel) {
  return 2 * kernel.granules_per_step *
         (kernel.k_granule_bytes(params.head_dim) + kernel.v_granule_bytes(params.head_dim_v) +
          kMaxRows * static_cast<int64_t>(sizeof(uint32_t)));
}

KeyCursor::Range KeyCursor::block_range(int64_t i) const {
  const int64_t begin = blocks_[i] * params_.block_kv;
  return {std::max(begin, block_resume_), std::min(begin + params_.block_kv, limit_)};
}

bool KeyCursor::next_candidates(Candidates& found) {
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
    const Range block = block_range(next_block_);
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

bool KeyCursor::seen_by_all_rows(const Range& run, bool in_window) const {
  const int64_t last_position = first_position_ + rows_ - 1;
  if (run.end - run.begin < kGranule && !kernel_.in_place) return false;  // zeros follow
  if (params_.is_causal && run.end - 1 > first_position_) return false;
  if (!in_window) return true;
  return last_position - run.begin < window_size_ && run.end - 1 - first_position_ < window_size_;
}

// Bit j of word r: row r of the tile sees the key at positions[j]. Positions ascend, so each rule
// admits a contiguous range of bits.
const uint32_t* KeyCursor::row_masks(const int32_t* positions, int count, uint32_t always,
                                     uint32_t window, int slot) {
  uint32_t* masks = mask_scratch_ + slot * kMaxRows;
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
  return masks;
}

// Makes a granule of two aligned runs of 16 keys that are packed already; false if it cannot.
bool KeyCursor::join_halves(const int32_t* positions, int count, std::byte* k, std::byte* v) const {
  if (count < kGranule) return false;
  for (int half = 0; half < 2; ++half) {
    const int32_t* run = positions + half * 16;
    if (run[0] / kGranule >= source_.packed_granules) return false;
    if (run[0] % 16 != 0 || run[15] != run[0] + 15) return false;
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t first = positions[half * 16], granule = first / kGranule;
    const int from = first % kGranule != 0;
    copy_half(source_.packed_k + granule * k_bytes_, from, k, half, k_bytes_, kernel_.k_period);
    copy_half(source_.packed_v + granule * v_bytes_, from, v, half, v_bytes_, kernel_.v_period);
  }
  return true;
}

Granule KeyCursor::packed_granule(const std::byte* k, const std::byte* v, int count) const {
  return {k, v, params_.head_dim, params_.head_dim_v, count, nullptr};
}

// Packs the keys at the given positions, then zeros, into a granule of this thread.
Granule KeyCursor::pack(const int32_t* positions, int count, int slot) {
  const int64_t size = element_size(params_.dtype);
  const void* rows[kGranule];
  std::byte* k = packed_scratch_ + slot * (k_bytes_ + v_bytes_);
  std::byte* v = k + k_bytes_;
  if (join_halves(positions, count, k, v)) return packed_granule(k, v, count);
  for (int i = 0; i < kGranule; ++i) {
    rows[i] = i < count ? source_.k + positions[i] * params_.k_stride.row * size : kZeroRow;
  }
  kernel_.pack_k(rows, params_.head_dim, k);
  for (int i = 0; i < kGranule; ++i) {
    rows[i] = i < count ? source_.v + positions[i] * params_.v_stride.row * size : kZeroRow;
  }
  kernel_.pack_v(rows, params_.head_dim_v, v);
  return packed_granule(k, v, count);
}

// Whether use_run can take these candidates.
bool KeyCursor::is_run(const Candidates& found) const {
  const uint32_t keys = found.always | found.window;
  if (keys == low_bits(params_.seqlen_kv - found.begin)) return true;
  constexpr int kShortest = 8;
  const int count = std::popcount(keys);
  return kernel_.in_place && count >= kShortest &&
         keys >> std::countr_zero(keys) == low_bits(count);
}

Granule KeyCursor::use_run(const Candidates& found, int slot) {
  const uint32_t keys = found.always | found.window;
  const int first = std::countr_zero(keys), count = std::popcount(keys);
  const Range run{found.begin + first, found.begin + first + count};
  int32_t positions[kGranule];
  for (int i = 0; i < count; ++i) positions[i] = static_cast<int32_t>(run.begin + i);
  Granule granule;
  if (kernel_.in_place) {
    const int64_t size = element_size(params_.dtype);
    granule = {source_.k + run.begin * params_.k_stride.row * size,
               source_.v + run.begin * params_.v_stride.row * size,
               params_.k_stride.row,
               params_.v_stride.row,
               count,
               nullptr};
  } else if (run.begin / kGranule < source_.packed_granules) {
    const int64_t i = run.begin / kGranule;
    granule =
        packed_granule(source_.packed_k + i * k_bytes_, source_.packed_v + i * v_bytes_, count);
  } else {
    granule = pack(positions, count, slot);
  }
  if (!seen_by_all_rows(run, found.window != 0)) {
    granule.visible =
        row_masks(positions, count, found.always >> first, found.window >> first, slot);
  }
  return granule;
}

Granule KeyCursor::use_gathered(int count, int slot) {
  const uint32_t always = static_cast<uint32_t>(pending_always_) & low_bits(count);
  Granule granule = pack(pending_, count, slot);
  const bool all_rows_see =
      always == kAll && (!params_.is_causal || pending_[count - 1] <= first_position_);
  if (!all_rows_see) {
    granule.visible = row_masks(pending_, count, always, ~always & low_bits(count), slot);
  }
  std::copy(pending_ + count, pending_ + num_pending_, pending_);
  num_pending_ -= count;
  pending_always_ >>= count;
  return granule;
}

int KeyCursor::next(Granule* granules) {
  int filled = 0;
  first_slot_ = static_cast<int>(kernel_.granules_per_step) - first_slot_;
  Candidates found;
  while (filled < kernel_.granules_per_step) {
    if (num_pending_ >= kGranule) {
      granules[filled] = use_gathered(kGranule, first_slot_ + filled);
      ++filled;
      continue;
    }
    if (!next_candidates(found)) break;
    if (is_run(found)) {
      granules[filled] = use_run(found, first_slot_ + filled);
      ++filled;
      continue;
    }
    for (uint32_t candidates = found.always | found.window; candidates != 0;
         candidates &= candidates - 1) {
      const int bit = std::countr_zero(candidates);
      pending_always_ |= static_cast<uint64_t>(found.always >> bit & 1) << num_pending_;
      pending_[num_pending_++] = static_cast<int32_t>(found.begin + bit);
    }
  }
  if (filled < kernel_.granules_per_step && num_pending_ > 0) {
    granules[filled] = use_gathered(std::min(num_pending_, kGranule), first_slot_ + filled);
    ++filled;
  }
  return filled;
}

}  // namespace sparse_attn::cpu
