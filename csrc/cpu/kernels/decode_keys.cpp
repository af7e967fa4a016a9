#include "cpu/kernels/decode_keys.h"

#include <algorithm>
#include <bit>

namespace sparse_attn::cpu {

namespace {

uint64_t low_bits_64(int n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

}  // namespace

DecodeKeys::DecodeKeys(const AttentionParams& params, const CandidateWalk& walk,
                       const TileIndex& tile, int64_t kv_head)
    : params_(params),
      walk_(walk),
      tile_(tile),
      k_(byte_offset(params.k, tile.batch * params.k_stride.batch + kv_head * params.k_stride.head,
                     params.dtype)),
      v_(byte_offset(params.v, tile.batch * params.v_stride.batch + kv_head * params.v_stride.head,
                     params.dtype)),
      k_row_bytes_(params.k_stride.row * element_size(params.dtype)),
      v_row_bytes_(params.v_stride.row * element_size(params.dtype)) {}

void DecodeKeys::append(const Candidates& found, KeyBatch& batch) {
  const std::byte* k = k_ + found.begin * k_row_bytes_;
  const std::byte* v = v_ + found.begin * v_row_bytes_;
  const void** k_rows = batch.k + batch.count;
  const void** v_rows = batch.v + batch.count;
  uint32_t bits = found.all();
  if (bits == ~uint32_t{0}) {
    for (int i = 0; i < kGranule; ++i) k_rows[i] = k + i * k_row_bytes_;
    for (int i = 0; i < kGranule; ++i) v_rows[i] = v + i * v_row_bytes_;
    return;
  }
  for (; bits != 0; bits &= bits - 1) {
    const int i = std::countr_zero(bits);
    *k_rows++ = k + i * k_row_bytes_;
    *v_rows++ = v + i * v_row_bytes_;
  }
}

void DecodeKeys::append_from_pages(const Candidates& found, KeyBatch& batch) {
  const void** k_rows = batch.k + batch.count;
  const void** v_rows = batch.v + batch.count;
  for (uint32_t bits = found.all(); bits != 0; bits &= bits - 1) {
    const int64_t j = found.begin + std::countr_zero(bits);
    if (j >= page_end_) {
      const int64_t i = j / params_.page_size, page = params_.pages[i];
      page_begin_ = i * params_.page_size;
      page_end_ = page_begin_ + params_.page_size;
      k_page_ = k_ + page * params_.k_stride.batch * element_size(params_.dtype);
      v_page_ = v_ + page * params_.v_stride.batch * element_size(params_.dtype);
    }
    *k_rows++ = k_page_ + (j - page_begin_) * k_row_bytes_;
    *v_rows++ = v_page_ + (j - page_begin_) * v_row_bytes_;
  }
}

void DecodeKeys::append_positions(const Candidates& found, KeyBatch& batch) const {
  int32_t* positions = batch.positions + batch.count;
  for (uint32_t bits = found.all(); bits != 0; bits &= bits - 1) {
    *positions++ = static_cast<int32_t>(found.begin + std::countr_zero(bits));
  }
}

void DecodeKeys::describe(const KeyBatch& batch, int64_t i, KeyTerms<kBatchKeys>& terms) const {
  const HeadBias bias(params_, tile_.batch, tile_.head + i, walk_.rules().first_position());
  bias.describe(batch.count, [&](int j) { return batch.positions[j]; }, terms);
}

void DecodeKeys::next(KeyBatch& batch) {
  batch.count = 0;
  std::fill(batch.visible, batch.visible + tile_.rows, uint64_t{0});
  Candidates found;
  while (batch.count <= kBatchKeys - kGranule && walk_.next(found)) {
    const uint32_t bits = found.all();
    const int count = std::popcount(bits);
    if (count == 0) continue;
    if (params_.pages == nullptr) {
      append(found, batch);
    } else {
      append_from_pages(found, batch);
    }
    if (is_biased()) append_positions(found, batch);
    const KeyRange run{found.begin + std::countr_zero(bits),
                       found.begin + kGranule - std::countl_zero(bits)};
    if (tile_.rows == 1 || walk_.rules().all_rows_see(run, found.window != 0)) {
      const uint64_t seen = low_bits_64(count) << batch.count;
      for (int64_t i = 0; i < tile_.rows; ++i) batch.visible[i] |= seen;
    } else {
      int32_t positions[kGranule];
      uint32_t always = 0, masks[kMostDecodeQueries];
      int n = 0;
      for (uint32_t rest = bits; rest != 0; rest &= rest - 1, ++n) {
        const int i = std::countr_zero(rest);
        positions[n] = static_cast<int32_t>(found.begin + i);
        always |= (found.always >> i & 1) << n;
      }
      walk_.rules().row_masks(positions, count, always, ~always & low_bits(count), masks);
      for (int64_t i = 0; i < tile_.rows; ++i) {
        batch.visible[i] |= static_cast<uint64_t>(masks[i]) << batch.count;
      }
    }
    batch.count += count;
  }
  if (batch.count == 0) return;
  std::fill(batch.k + batch.count, batch.k + kBatchKeys, batch.k[batch.count - 1]);
}

}  // namespace sparse_attn::cpu
