#include "cpu/forward/packed_keys.h"

#include <algorithm>

#include "cpu/runtime/zero_row.h"
#include "integers.h"

namespace sparse_attn::cpu {

PackedKeys::PackedKeys(const AttentionParams& params, const TileKernel& kernel, int64_t kv_head,
                       int64_t most_bytes)
    : params_(params),
      kernel_(kernel),
      kv_head_(kv_head),
      k_bytes_(kernel.k_granule_bytes(params.head_dim)),
      v_bytes_(kernel.v_granule_bytes(params.head_dim_v)),
      granules_(
          std::min(ceil_div(params.seqlen_kv, kGranule), most_bytes / (k_bytes_ + v_bytes_))) {}

void PackedKeys::pack_chunk(int64_t chunk, std::byte* memory) const {
  const int64_t end = std::min(granules_, (chunk + 1) * kChunk);
  for (int64_t i = chunk * kChunk; i < end; ++i) pack_granule(i, memory);
}

KeySource PackedKeys::source(const std::byte* memory) const {
  const int64_t batch = kv_head_ / params_.num_kv_heads, head = kv_head_ % params_.num_kv_heads;
  const auto rows = [&](const void* base, const Strides& stride) {
    return static_cast<const std::byte*>(base) +
           (batch * stride.batch + head * stride.head) * element_size(params_.dtype);
  };
  KeySource source;
  source.k = rows(params_.k, params_.k_stride);
  source.v = rows(params_.v, params_.v_stride);
  if (memory != nullptr) {
    source.packed_granules = granules_;
    source.packed_k = memory;
    source.packed_v = memory + granules_ * k_bytes_;
  }
  return source;
}

void PackedKeys::pack_granule(int64_t i, std::byte* memory) const {
  const KeySource head = source(nullptr);
  const int64_t size = element_size(params_.dtype);
  const void* k_rows[kGranule];
  const void* v_rows[kGranule];
  for (int64_t row = 0; row < kGranule; ++row) {
    const int64_t j = i * kGranule + row;
    const bool exists = j < params_.seqlen_kv;
    k_rows[row] = exists ? head.k + params_.key_offset(params_.k_stride, j) * size : kZeroRow;
    v_rows[row] = exists ? head.v + params_.key_offset(params_.v_stride, j) * size : kZeroRow;
  }
  kernel_.pack_k(k_rows, params_.head_dim, memory + i * k_bytes_);
  kernel_.pack_v(v_rows, params_.head_dim_v, memory + granules_ * k_bytes_ + i * v_bytes_);
}

}  // namespace sparse_attn::cpu
