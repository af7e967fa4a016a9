// Tiles of rows in shared memory, and their fragments.
#pragma once

#include "cuda/primitives.h"

namespace sparse_attn::cuda {

// Rows of 2-byte elements, in chunks of 16 bytes. Chunks are swapped within a row by the row's
// number, so that 8 rows of one column lie in different banks.
template <int kColumns>
struct SharedRows {
  static constexpr int kChunks = kColumns / 8;
  static_assert(kChunks >= 8, "the swap needs rows of at least 128 bytes");

  static constexpr uint32_t bytes(int rows) { return rows * kColumns * 2; }
  DEVICE static uint32_t offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row & 7))) * 16;
  }

  // a: rows first to first + 15, at depth 16 * step.
  DEVICE static void load_a(uint32_t (&a)[4], uint32_t tile, int first, int step, int lane) {
    load_matrices(a, tile + offset(first + lane % 16, step * 2 + lane / 16));
  }
  // b of two column tiles: rows first to first + 15 are the columns, at depth 16 * step.
  DEVICE static void load_b(uint32_t (&b)[4], uint32_t tile, int first, int step, int lane) {
    const int row = first + lane / 16 * 8 + lane % 8;
    load_matrices(b, tile + offset(row, step * 2 + lane / 8 % 2));
  }
  // b of two column tiles: rows first to first + 15 are the depth, chunks are the columns.
  DEVICE static void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int first, int chunk,
                                       int lane) {
    load_matrices_transposed(b, tile + offset(first + lane % 16, chunk + lane / 16));
  }
};

}  // namespace sparse_attn::cuda
