// Brings tiles of keys, values and queries to shared memory.
#pragma once

#include "cuda/tiles.h"
#include "cuda/walk.h"

namespace sparse_attn::cuda {

// Where a kernel of 4 warps keeps its tiles of 64 rows and 64 keys.
template <int kHeadDim_>
struct SharedLayout {
  static constexpr int kHeadDim = kHeadDim_, kRows = 64, kThreads = 128, kStages = 2;
  using Rows = SharedRows<kHeadDim>;
  static constexpr uint32_t kTile = Rows::bytes(kTileKeys);
  static constexpr uint32_t kStage = 2 * kTile + kTileKeys * 4;  // keys, values, positions
  static constexpr int kRowsAtOnce = kThreads / Rows::kChunks;
  static constexpr uint32_t kBytes = Rows::bytes(kRows) + kStages * kStage;

  DEVICE static uint32_t queries() { return shared_memory(); }
  DEVICE static uint32_t keys(int stage) {
    return shared_memory() + Rows::bytes(kRows) + static_cast<uint32_t>(stage) * kStage;
  }
  DEVICE static uint32_t values(int stage) { return keys(stage) + kTile; }
  DEVICE static uint32_t positions(int stage) { return keys(stage) + 2 * kTile; }
};

// Rows `first` to `end` of q; zeros in place of what does not exist.
template <class Layout, class Element>
DEVICE void fetch_queries(Global<const Element> q, int64_t row_stride, int chunks, int first,
                          int end, int thread) {
  using Rows = typename Layout::Rows;
  const int chunk = thread % Rows::kChunks;
  UNROLL
  for (int i = 0; i < Layout::kRows / Layout::kRowsAtOnce; ++i) {
    const int row = i * Layout::kRowsAtOnce + thread / Rows::kChunks;
    const bool exists = first + row < end && chunk < chunks;
    const int64_t offset = exists ? (first + row) * row_stride + chunk * 8 : 0;
    copy_async(Layout::queries() + Rows::offset(row, chunk), q + offset, exists);
  }
}

template <class Element>
struct KeySource {
  Global<const Element> k, v;
  int64_t k_stride, v_stride;
  int chunks, chunks_v;
};

// The keys and values of a tile of the walk, and their positions.
template <class Layout, class Element>
DEVICE void fetch_keys(const KeySource<Element>& source, const Walk& walk, int tile, int stage,
                       int thread) {
  using Rows = typename Layout::Rows;
  const int chunk = thread % Rows::kChunks;
  UNROLL
  for (int i = 0; i < kTileKeys / Layout::kRowsAtOnce; ++i) {
    const int n = i * Layout::kRowsAtOnce + thread / Rows::kChunks;
    const int j = walk.position(tile, n);
    const bool has_k = j != kNoKey && chunk < source.chunks;
    const bool has_v = j != kNoKey && chunk < source.chunks_v;
    const uint32_t offset = Rows::offset(n, chunk);
    copy_async(Layout::keys(stage) + offset,
               source.k + (has_k ? j * source.k_stride + chunk * 8 : 0), has_k);
    copy_async(Layout::values(stage) + offset,
               source.v + (has_v ? j * source.v_stride + chunk * 8 : 0), has_v);
    if (chunk == 0) store_shared<int>(Layout::positions(stage) + n * 4, j);
  }
}

}  // namespace sparse_attn::cuda
