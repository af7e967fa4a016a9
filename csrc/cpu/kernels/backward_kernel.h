// What the gradient kernel of one instruction set offers.
//
// With p = exp(s - lse) and ds = p * (dp - delta), a key tile adds, for each query tile that sees
// it, dv += p^T dout, dk += ds^T q and dq += ds k. Query tiles are packed once in a call, a key
// tile when its turn comes; dk and dv stay in scratch memory until all query tiles have been added.
#pragma once

#include <cstddef>

#include "cpu/layout/biases.h"
#include "cpu/layout/visibility.h"
#include "params.h"

namespace sparse_attn::cpu {

// The memory of a query tile: one float each per row, then what the kernel wants.
struct QueryTileHead {
  float* lse;    // +inf for rows without weights
  float* delta;  // rowsum(dout * out) - dlse

  static int64_t bytes(int64_t rows) { return (2 * rows * 4 + 63) / 64 * 64; }
  QueryTileHead(std::byte* tile, int64_t rows)
      : lse(reinterpret_cast<float*>(tile)), delta(lse + rows) {}
};

struct TileShape : ScoreParams {
  int64_t rows = 0;  // in every query tile: 32, 64 or 128; what is missing in the last one is zero
  int64_t head_dim = 0, head_dim_v = 0;
};

// What a query tile adds to the scores of a key tile, and the gradients of that.
struct KeyTileBias {
  KeyTerms<kKeyTile> terms;
  double dbias[kKeyTile];  // sum of ds before the softcap's factor; pairs add to it
  double dslope;           // minus the sum of that times the distances; likewise

  KeyTileBias() { clear(); }
  void clear() {
    for (double& x : dbias) x = 0;
    dslope = 0;
  }
};

struct BackwardKernel {
  int64_t max_rows = 0;  // in a query tile

  int64_t (*query_tile_bytes)(const TileShape& shape) = nullptr;
  int64_t (*scratch_bytes)(const TileShape& shape) = nullptr;

  // Packs rows given by pointers to their first elements; delta becomes rowsum(dout * out).
  void (*pack_queries)(const TileShape& shape, const void* const* q, const void* const* dout,
                       const void* const* out, std::byte* tile) = nullptr;
  // Packs kKeyTile keys and sets dk and dv to zero.
  void (*pack_keys)(const TileShape& shape, const void* const* k, const void* const* v,
                    std::byte* scratch) = nullptr;
  // Adds what one query tile and the key tile give to dq, dk and dv; `first` sets dq. Fetches the
  // tile that comes next, unless it is null. `bias` is null if nothing is added to scores.
  void (*add_pair)(const TileShape& shape, const Visibility& visibility, bool first,
                   std::byte* tile, const std::byte* next_tile, KeyTileBias* bias,
                   std::byte* scratch) = nullptr;
  // Write rows of the results, without gaps between them.
  void (*write_queries)(const TileShape& shape, std::byte* tile, int64_t rows, void* dq) = nullptr;
  void (*write_keys)(const TileShape& shape, std::byte* scratch, int64_t keys, void* dk,
                     void* dv) = nullptr;

  // Put the calling thread into the state that the kernel needs, and back.
  uint32_t (*enter)() = nullptr;
  void (*leave)(uint32_t saved) = nullptr;
};

}  // namespace sparse_attn::cpu
