// The keys of one KV head as granules, in memory of the caller.
#pragma once

#include <cstddef>

#include "cpu/kernels/key_cursor.h"
#include "cpu/kernels/tile_kernel.h"

namespace sparse_attn::cpu {

class PackedKeys {
 public:
  // At most `most_bytes` of them: of one very long head, the last keys are not packed.
  PackedKeys(const AttentionParams& params, const TileKernel& kernel, int64_t kv_head,
             int64_t most_bytes);

  int64_t bytes() const { return granules_ * (k_bytes_ + v_bytes_); }

  // Chunks are packed in any order, or at once.
  int64_t num_chunks() const { return (granules_ + kChunk - 1) / kChunk; }
  void pack_chunk(int64_t chunk, std::byte* memory) const;

  // The head's keys: packed in `memory`, or all as they are if it is null.
  KeySource source(const std::byte* memory) const;

 private:
  static constexpr int64_t kChunk = 16;  // granules

  void pack_granule(int64_t i, std::byte* memory) const;

  const AttentionParams& params_;
  const TileKernel& kernel_;
  int64_t kv_head_;  // counted over the whole batch
  int64_t k_bytes_, v_bytes_;
  int64_t granules_;
};

}  // namespace sparse_attn::cpu
