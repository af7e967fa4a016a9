// What a kernel of one instruction set offers, and the granules of keys that it consumes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/layout/biases.h"
#include "cpu/layout/granule.h"
#include "params.h"

namespace sparse_attn::cpu {

class KeyCursor;

// Up to 32 keys as one query tile sees them: packed, or rows in memory (in-place kernels).
struct Granule {
  const void* k = nullptr;
  const void* v = nullptr;
  const void* k_high = nullptr;  // packed: keys 16 to 31, which may lie apart from the others
  const void* v_high = nullptr;
  int64_t k_stride = 0, v_stride = 0;  // from one row to the next, in elements
  int count = kGranule;                // of keys that exist; packed ones are followed by zeros
  // One word for each row of the tile: bit j says whether the row sees key j. Null: all do.
  const uint32_t* visible = nullptr;
  RowRange rows = {};                         // no row outside sees any of the keys
  const KeyTerms<kGranule>* terms = nullptr;  // of the keys, if the cursor is biased
};

// Consecutive rows of one head that share one list of candidate keys.
struct QueryTile : ScoreParams {
  const void* q = nullptr;
  const void* next_q = nullptr;  // first row of the tile that likely follows, to be fetched
  void* out = nullptr;
  float* lse = nullptr;
  int64_t q_row_stride = 0, out_row_stride = 0;
  bool streams_out = false;  // rows of out, whole cache lines, may be written past the caches
  int64_t rows = 0;
  int64_t head_dim = 0, head_dim_v = 0;
  const float* sink_logit = nullptr;
};

struct TileKernel {
  int64_t block_m = 0;            // most rows in a tile, at most 64
  int64_t granules_per_step = 0;  // most granules taken from the cursor at once
  bool in_place = false;  // takes runs of rows as they lie in memory, instead of packed ones

  int64_t (*k_granule_bytes)(int64_t head_dim) = nullptr;
  int64_t (*v_granule_bytes)(int64_t head_dim_v) = nullptr;
  // A granule is made of periods of so many bytes (0: one period), each with the part of its first
  // 16 keys before that of the others.
  int64_t k_period = 0, v_period = 0;
  // Whether the halves of a granule's keys may lie apart; its values may in tiles of at most so
  // many rows.
  bool splits_keys = false;
  int64_t most_rows_splitting_values = 0;
  // Pack 32 rows, given by pointers to their first elements.
  void (*pack_k)(const void* const* rows, int64_t head_dim, void* granule) = nullptr;
  void (*pack_v)(const void* const* rows, int64_t head_dim_v, void* granule) = nullptr;

  int64_t (*scratch_bytes)(int64_t head_dim, int64_t head_dim_v) = nullptr;
  // Returns the rows, as bits, whose result may be wrong, because a number that is not finite came
  // up, or all scores are -inf: what a row does not see counts with a weight of 0, and 0 * inf is
  // NaN. They are to be repeated by decode_row.
  uint64_t (*run_tile)(const QueryTile& tile, KeyCursor& keys, std::byte* scratch) = nullptr;

  // Put the calling thread into the state that the kernel needs, and back.
  uint32_t (*enter)() = nullptr;
  void (*leave)(uint32_t saved) = nullptr;
};

}  // namespace sparse_attn::cpu
