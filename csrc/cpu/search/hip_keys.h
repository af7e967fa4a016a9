// The sampled keys of the blocks that HiP searches, for one KV head.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/search/hip.h"

namespace sparse_attn::cpu {

// Blocks are counted from the first one that is searched. The keys are read where they lie or, when
// many searches read them, from a copy. The copy has the blocks in the order of the nodes whose
// centres they are: first the odd ones, then the odd multiples of 2, of 4, ..., last block 0. The
// keys of one step of the search are then neighbours, and not a power of two of bytes apart, which
// would put them into few sets of a cache.
class SampledKeys {
 public:
  SampledKeys(const HipParams& params, int64_t b, int64_t kv_head)
      : key_bytes_(params.head_dim * element_size(params.dtype)),
        source_row_bytes_(params.k_stride.row * element_size(params.dtype)),
        block_k_(params.block_k),
        first_(params.stride_k / 2),
        stride_(params.stride_k),
        per_block_(ceil_div(params.block_k - first_, stride_)),
        first_block_(params.sink / params.block_k),
        seqlen_(params.seqlen_kv) {
    const int64_t head = b * params.k_stride.batch + kv_head * params.k_stride.head;
    source_ = static_cast<const std::byte*>(params.k) + head * element_size(params.dtype);
    num_blocks_ = std::max<int64_t>(0, ceil_div(seqlen_, block_k_) - first_block_);
  }

  int64_t per_block() const { return per_block_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t copy_bytes() const { return num_blocks_ * per_block_ * row_bytes(true); }

  // Bytes from a key of a block to the next one.
  int64_t row_bytes() const { return row_bytes(copy_ != nullptr); }

  // The first sampled key of a block.
  const std::byte* block(int64_t n) const {
    if (copy_ == nullptr) return key(begin(n) + first_);
    return copy_ + place(n) * per_block_ * row_bytes();
  }

  // The sampled key `i` of a block, or the last one before `end` if it lies behind that.
  const std::byte* key(int64_t n, int64_t i, int64_t end) const {
    const int64_t j = begin(n) + first_ + i * stride_;
    return j < end ? block(n) + i * row_bytes() : key(end - 1);
  }

  const std::byte* key(int64_t j) const { return source_ + j * source_row_bytes_; }

  // Whether all sampled keys of a block lie before `end`.
  bool whole(int64_t n, int64_t end) const {
    return begin(n) + first_ + (per_block_ - 1) * stride_ < end;
  }

  // From now on keys are read from `copy`, which copy_block() fills.
  void read_from(std::byte* copy) { copy_ = copy; }

  void copy_block(int64_t n) const {
    std::byte* row = copy_ + place(n) * per_block_ * row_bytes();
    for (int64_t i = 0; i < per_block_; ++i, row += row_bytes()) {
      std::memcpy(row, key(std::min(begin(n) + first_ + i * stride_, seqlen_ - 1)), key_bytes_);
    }
  }

 private:
  int64_t row_bytes(bool copied) const {
    return copied ? (key_bytes_ + 63) / 64 * 64 : stride_ * source_row_bytes_;
  }
  int64_t begin(int64_t n) const { return (first_block_ + n) * block_k_; }

  // Behind the odd multiples of each smaller power of two.
  int64_t place(int64_t n) const {
    if (n == 0) return num_blocks_ - 1;
    const int level = std::countr_zero(static_cast<uint64_t>(n));
    const int64_t multiples = ((num_blocks_ - 1) >> level) + 1;  // of 2^level
    return num_blocks_ - multiples + (n >> (level + 1));
  }

  int64_t key_bytes_, source_row_bytes_, block_k_, first_, stride_, per_block_, first_block_;
  int64_t seqlen_, num_blocks_;
  const std::byte* source_;
  std::byte* copy_ = nullptr;
};

}  // namespace sparse_attn::cpu
