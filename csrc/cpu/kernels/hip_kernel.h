// What the search kernels of one instruction set offer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_attn::cpu {

// Pointers to keys come in whole numbers of so many; the last ones may repeat.
inline constexpr int64_t kHipKeys = 64;
inline constexpr int64_t kHipRun = 16;  // keys

// The scores of keys: their largest product with any of the sampled rows, the products of a row
// counted from its origin.
struct HipKernel {
  int64_t (*query_bytes)(int64_t num_rows, int64_t head_dim) = nullptr;
  void (*prepare_queries)(const void* const* rows, int64_t num_rows, int64_t head_dim,
                          std::byte* queries) = nullptr;
  // Makes the greatest product of each row with these keys, a multiple of kHipKeys, its origin,
  // which was 0. What is not finite is left 0.
  void (*set_origins)(std::byte* queries, int64_t num_rows, int64_t head_dim,
                      const void* const* keys, int64_t count) = nullptr;
  void (*score)(const std::byte* queries, int64_t num_rows, int64_t head_dim,
                const void* const* keys, int64_t count, float* best) = nullptr;
  // For each search, the greatest score of each run of kHipRun keys, which lie row_bytes apart.
  // Null if a kernel gains nothing from that; only for head_dim % 32 == 0.
  void (*score_runs)(const std::byte* const* queries, int64_t num_searches, int64_t num_rows,
                     int64_t head_dim, const std::byte* const* runs, int64_t count,
                     int64_t row_bytes, float* const* best) = nullptr;
  uint32_t (*enter)() = nullptr;
  void (*leave)(uint32_t saved) = nullptr;
};

// The mean of rows, in their dtype.
struct MeanKernel {
  void (*run)(const void* const* rows, int64_t num_rows, int64_t head_dim, void* result) = nullptr;
};

}  // namespace sparse_attn::cpu
