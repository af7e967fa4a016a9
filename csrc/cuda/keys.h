// Brings tiles of keys, values and queries to shared memory.
#pragma once

#include "cuda/tiles.h"
#include "cuda/walk.h"

namespace sparse_attn::cuda {

// Where a kernel of 4 warps keeps its tiles of 64 rows and 64 keys.
template <int kHeadDim_>
struct SharedLayout {
  static constexpr int kHeadDim = kHeadDim_, kRows = 64, kThreads = 128, kStages = 2;
  static constexpr int kPositionStages = 4;  // positions are known two tiles ahead
  using Rows = SharedRows<kHeadDim>;
  static constexpr uint32_t kTile = Rows::bytes(kTileKeys);
  static constexpr uint32_t kStage = 2 * kTile;  // keys, values
  static constexpr uint32_t kPositions = Rows::bytes(kRows) + kStages * kStage;
  static constexpr int kRowsAtOnce = kThreads / Rows::kChunks;
  static constexpr uint32_t kBytes = kPositions + kPositionStages * kTileKeys * 4;

  DEVICE static uint32_t queries() { return shared_memory(); }
  DEVICE static uint32_t keys(int tile) {
    return shared_memory() + Rows::bytes(kRows) + static_cast<uint32_t>(tile % kStages) * kStage;
  }
  DEVICE static uint32_t values(int tile) { return keys(tile) + kTile; }
  DEVICE static uint32_t positions(int tile) {
    return shared_memory() + kPositions +
           static_cast<uint32_t>(tile % kPositionStages) * kTileKeys * 4;
  }
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

// Finds the keys of a tile of the walk, one for each of the first threads.
template <class Layout>
DEVICE void find_keys(const Walk& walk, int tile, int thread) {
  if (tile >= walk.num_tiles() || thread >= kTileKeys) return;
  store_shared<int>(Layout::positions(tile) + thread * 4, walk.position(tile, thread));
}

// Their rows of k and v.
template <class Layout, class Element>
DEVICE void fetch_keys(const KeySource<Element>& source, int tile, int thread) {
  using Rows = typename Layout::Rows;
  const int chunk = thread % Rows::kChunks;
  NO_UNROLL  // eight rows at once would take too many registers
      for (int i = 0; i < kTileKeys / Layout::kRowsAtOnce; ++i) {
    const int n = i * Layout::kRowsAtOnce + thread / Rows::kChunks;
    const int j = load_shared<int>(Layout::positions(tile) + n * 4);
    const bool has_k = j != kNoKey && chunk < source.chunks;
    const bool has_v = j != kNoKey && chunk < source.chunks_v;
    const uint32_t offset = Rows::offset(n, chunk);
    copy_async(Layout::keys(tile) + offset,
               source.k + (has_k ? j * source.k_stride + chunk * 8 : 0), has_k);
    copy_async(Layout::values(tile) + offset,
               source.v + (has_v ? j * source.v_stride + chunk * 8 : 0), has_v);
  }
}

}  // namespace sparse_attn::cuda
