// Scores of HiP's candidates in float32 fused multiply-adds, for any vector width.
#pragma once

#include "decode_kernel.h"
#include "hip.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

static_assert(kHipKeys == kBatchKeys);

static int64_t hip_query_bytes(int64_t num_rows, int64_t head_dim) {
  return num_rows * decode_q_stride(head_dim) * static_cast<int64_t>(sizeof(float));
}

template <class T>
static void mean_of_rows(const void* const* rows, int64_t num_rows, int64_t head_dim,
                         void* result) {
  T* mean = static_cast<T*>(result);
  for (int64_t d = 0; d < head_dim; ++d) {
    float sum = 0;
    for (int64_t r = 0; r < num_rows; ++r) sum += to_float(static_cast<const T*>(rows[r])[d]);
    from_float(sum / static_cast<float>(num_rows), mean[d]);
  }
}

template <class T>
static void prepare_hip_queries(const void* const* rows, int64_t num_rows, int64_t head_dim,
                                std::byte* queries) {
  const int64_t stride = decode_q_stride(head_dim);
  float* dest = reinterpret_cast<float*>(queries);
  for (int64_t r = 0; r < num_rows; ++r, dest += stride) {
    convert_row(static_cast<const T*>(rows[r]), head_dim, dest);
    std::fill(dest + head_dim, dest + stride, 0.0f);
  }
}

template <class T>
static void score_hip_keys(const std::byte* queries, int64_t num_rows, int64_t head_dim,
                           const void* const* keys, int64_t count, float* best) {
  const float* q = reinterpret_cast<const float*>(queries);
  const int64_t stride = decode_q_stride(head_dim);
  static const KeyBatch kNoKeys = {};
  KeyBatch batches[2];
  const auto fill = [&](KeyBatch& batch, int64_t begin) {
    batch.count = static_cast<int>(std::clamp<int64_t>(count - begin, 0, kBatchKeys));
    if (batch.count > 0) std::copy(keys + begin, keys + begin + kBatchKeys, batch.k);
  };
  fill(batches[0], 0);
  for (int64_t j = 0; j < count; j += kBatchKeys, best += kBatchKeys) {
    const KeyBatch& now = batches[j / kBatchKeys % 2];
    KeyBatch& next = batches[(j / kBatchKeys + 1) % 2];
    fill(next, j + kBatchKeys);
    std::fill(best, best + kBatchKeys, kMinusInfinity);
    for_row_parts(num_rows, [&](auto rows, int64_t r) {
      float scores[rows() * kBatchKeys];
      score_keys<T, rows()>(now, r == 0 ? next : kNoKeys, q + r * stride, stride, head_dim, scores);
      for (int i = 0; i < rows() * kBatchKeys; i += kLanes) {
        float* top = best + i % kBatchKeys;
        if (i % kBatchKeys < now.count) store(top, maximum(load(scores + i), load(top)));
      }
    });
  }
}

template <class T>
static const HipKernel& hip_kernel() {
  static constexpr HipKernel kKernel = {hip_query_bytes,   mean_of_rows<T>, prepare_hip_queries<T>,
                                        score_hip_keys<T>, enter_kernel,    leave_kernel};
  return kKernel;
}

static inline const HipKernel& hip_kernel(DType dtype) {
  if (dtype == DType::kBFloat16) return hip_kernel<BFloat16>();
  if (dtype == DType::kFloat16) return hip_kernel<Float16>();
  return hip_kernel<float>();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
