#include "cpu/kernels/key_cursor.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>

#include "cpu/runtime/zero_row.h"

namespace sparse_attn::cpu {

namespace {

// From the first half of a granule of `bytes` to the second.
int64_t half_period(int64_t period, int64_t bytes) { return (period != 0 ? period : bytes) / 2; }

// Makes a granule of `bytes` of two halves.
void copy_halves(const std::byte* const* halves, std::byte* dest, int64_t bytes, int64_t period) {
  const int64_t run = half_period(period, bytes);
  for (int64_t start = 0; start < bytes; start += 2 * run) {
    for (int half = 0; half < 2; ++half) {
      std::memcpy(dest + start + half * run, halves[half] + start, run);
    }
  }
}

}  // namespace

int64_t candidate_estimate(const AttentionParams& params, const TileIndex& tile) {
  const CandidateWalk walk(params, tile);
  return walk.count_below(walk.limit());
}

KeyCursor::KeyCursor(const AttentionParams& params, const TileKernel& kernel, const TileIndex& tile,
                     const KeySource& source, std::byte* scratch)
    : params_(params),
      kernel_(kernel),
      source_(source),
      walk_(params, tile),
      bias_(params, tile.batch, tile.head, walk_.rules().first_position()),
      k_bytes_(kernel.k_granule_bytes(params.head_dim)),
      v_bytes_(kernel.v_granule_bytes(params.head_dim_v)) {
  packed_scratch_ = scratch;
  const int64_t slots = 2 * kernel.granules_per_step;
  mask_scratch_ = reinterpret_cast<uint32_t*>(scratch + slots * (k_bytes_ + v_bytes_));
  term_scratch_ = reinterpret_cast<KeyTerms<kGranule>*>(mask_scratch_ + slots * kMaxRows);
}

int64_t KeyCursor::scratch_bytes(const AttentionParams& params, const TileKernel& kernel) {
  return 2 * kernel.granules_per_step *
         (kernel.k_granule_bytes(params.head_dim) + kernel.v_granule_bytes(params.head_dim_v) +
          kMaxRows * static_cast<int64_t>(sizeof(uint32_t)) +
          (params.is_biased() ? static_cast<int64_t>(sizeof(KeyTerms<kGranule>)) : 0));
}

void KeyCursor::add_terms(Granule& granule, const int32_t* positions, int slot) {
  KeyTerms<kGranule>& terms = term_scratch_[slot];
  bias_.describe(granule.count, [&](int i) { return positions[i]; }, terms);
  granule.terms = &terms;
}

// Limits a granule of the given keys to what each row sees.
void KeyCursor::mask_rows(Granule& granule, const int32_t* positions, uint32_t always,
                          uint32_t window, int slot) {
  uint32_t* masks = mask_scratch_ + slot * kMaxRows;
  walk_.rules().row_masks(positions, granule.count, always, window, masks);
  granule.visible = masks;
  granule.rows = seeing_rows(masks, walk_.rules().rows());
}

// Whether the keys are two aligned runs of 16 that are packed already.
bool KeyCursor::has_packed_halves(const int32_t* positions, int count) const {
  if (count < kGranule) return false;
  for (int half = 0; half < 2; ++half) {
    const int32_t* run = positions + half * 16;
    if (run[0] / kGranule >= source_.packed_granules) return false;
    if (run[0] % 16 != 0 || run[15] != run[0] + 15) return false;
  }
  return true;
}

// Makes a granule of such runs. What the kernel does not take from where it lies is copied to `k`
// and `v`.
Granule KeyCursor::join_halves(const int32_t* positions, std::byte* k, std::byte* v) const {
  const std::byte *k_halves[2], *v_halves[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t first = positions[half * 16], granule = first / kGranule;
    const int from = first % kGranule != 0;
    k_halves[half] =
        source_.packed_k + granule * k_bytes_ + from * half_period(kernel_.k_period, k_bytes_);
    v_halves[half] =
        source_.packed_v + granule * v_bytes_ + from * half_period(kernel_.v_period, v_bytes_);
  }
  const bool splits_values = walk_.rules().rows() <= kernel_.most_rows_splitting_values;
  if (!kernel_.splits_keys) copy_halves(k_halves, k, k_bytes_, kernel_.k_period);
  if (!splits_values) copy_halves(v_halves, v, v_bytes_, kernel_.v_period);
  Granule granule = packed_granule(k, v, kGranule);
  if (kernel_.splits_keys) {
    granule.k = k_halves[0];
    granule.k_high = k_halves[1];
  }
  if (splits_values) {
    granule.v = v_halves[0];
    granule.v_high = v_halves[1];
  }
  return granule;
}

Granule KeyCursor::packed_granule(const std::byte* k, const std::byte* v, int count) const {
  Granule granule;
  granule.k = k;
  granule.v = v;
  granule.k_high = k + half_period(kernel_.k_period, k_bytes_);
  granule.v_high = v + half_period(kernel_.v_period, v_bytes_);
  granule.k_stride = params_.head_dim;
  granule.v_stride = params_.head_dim_v;
  granule.count = count;
  return granule;
}

// Packs the keys at the given positions, then zeros, into a granule of this thread.
Granule KeyCursor::pack(const int32_t* positions, int count, int slot) {
  const int64_t size = element_size(params_.dtype);
  const void* rows[kGranule];
  std::byte* k = packed_scratch_ + slot * (k_bytes_ + v_bytes_);
  std::byte* v = k + k_bytes_;
  if (has_packed_halves(positions, count)) return join_halves(positions, k, v);
  for (int i = 0; i < kGranule; ++i) {
    rows[i] = i < count ? source_.k + params_.key_offset(params_.k_stride, positions[i]) * size
                        : kZeroRow;
  }
  kernel_.pack_k(rows, params_.head_dim, k);
  for (int i = 0; i < kGranule; ++i) {
    rows[i] = i < count ? source_.v + params_.key_offset(params_.v_stride, positions[i]) * size
                        : kZeroRow;
  }
  kernel_.pack_v(rows, params_.head_dim_v, v);
  return packed_granule(k, v, count);
}

// Whether use_run can take these candidates.
bool KeyCursor::is_run(const Candidates& found) const {
  const uint32_t keys = found.all();
  const bool all_there_are = keys == low_bits(params_.seqlen_kv - found.begin);
  if (!kernel_.in_place) return all_there_are;
  constexpr int kShortest = 8;
  const int first = std::countr_zero(keys), count = std::popcount(keys);
  if (keys >> first != low_bits(count) || (count < kShortest && !all_there_are)) return false;
  if (params_.pages == nullptr) return true;
  const int64_t begin = found.begin + first;
  return begin / params_.page_size == (begin + count - 1) / params_.page_size;
}

Granule KeyCursor::use_run(const Candidates& found, int slot) {
  const int first = std::countr_zero(found.all()), count = std::popcount(found.all());
  const KeyRange run{found.begin + first, found.begin + first + count};
  const auto positions = [&] {
    std::array<int32_t, kGranule> positions;
    std::iota(positions.begin(), positions.end(), static_cast<int32_t>(run.begin));
    return positions;
  };
  Granule granule;
  if (kernel_.in_place) {
    const int64_t size = element_size(params_.dtype);
    granule.k = source_.k + params_.key_offset(params_.k_stride, run.begin) * size;
    granule.v = source_.v + params_.key_offset(params_.v_stride, run.begin) * size;
    granule.k_stride = params_.k_stride.row;
    granule.v_stride = params_.v_stride.row;
    granule.count = count;
  } else if (run.begin / kGranule < source_.packed_granules) {
    const int64_t i = run.begin / kGranule;
    granule =
        packed_granule(source_.packed_k + i * k_bytes_, source_.packed_v + i * v_bytes_, count);
  } else {
    granule = pack(positions().data(), count, slot);
  }
  const bool zeros_follow = count < kGranule && !kernel_.in_place;
  if (zeros_follow || !walk_.rules().all_rows_see(run, found.window != 0)) {
    mask_rows(granule, positions().data(), found.always >> first, found.window >> first, slot);
  }
  if (is_biased()) add_terms(granule, positions().data(), slot);
  return granule;
}

Granule KeyCursor::use_gathered(int count, int slot) {
  const uint32_t always = static_cast<uint32_t>(pending_always_) & low_bits(count);
  Granule granule = pack(pending_, count, slot);
  const bool all_rows_see = always == kAllKeys && walk_.rules().all_rows_reach(pending_[count - 1]);
  if (!all_rows_see) {
    mask_rows(granule, pending_, always, ~always & low_bits(count), slot);
  }
  if (is_biased()) add_terms(granule, pending_, slot);
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
    if (!walk_.next(found)) break;
    if (is_run(found)) {
      granules[filled] = use_run(found, first_slot_ + filled);
      ++filled;
      continue;
    }
    for (uint32_t candidates = found.all(); candidates != 0; candidates &= candidates - 1) {
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
