// Scores of HiP's candidates for few sampled rows, in float32 fused multiply-adds, for any vector
// width: the lanes of a vector are dims.
#pragma once

#include "cpu/kernels/decode_fma.h"
#include "cpu/kernels/hip_kernel.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

static_assert(kHipKeys == kBatchKeys);

// Rows, then their origins.
static int64_t hip_query_bytes(int64_t num_rows, int64_t head_dim) {
  return num_rows * (decode_q_stride(head_dim) + 1) * static_cast<int64_t>(sizeof(float));
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
  std::fill(dest, dest + num_rows, 0.0f);
}

// Calls visit(row, first key, keys of a vector, products) for all rows and keys.
template <class T>
static void hip_products(const float* q, int64_t num_rows, int64_t head_dim,
                         const void* const* keys, int64_t count, auto visit) {
  const int64_t stride = decode_q_stride(head_dim);
  static const KeyBatch kNoKeys = {};
  KeyBatch batches[2];
  const auto fill = [&](KeyBatch& batch, int64_t begin) {
    batch.count = static_cast<int>(std::clamp<int64_t>(count - begin, 0, kBatchKeys));
    if (batch.count > 0) std::copy(keys + begin, keys + begin + kBatchKeys, batch.k);
  };
  fill(batches[0], 0);
  for (int64_t j = 0; j < count; j += kBatchKeys) {
    const KeyBatch& now = batches[j / kBatchKeys % 2];
    KeyBatch& next = batches[(j / kBatchKeys + 1) % 2];
    fill(next, j + kBatchKeys);
    for_row_parts(num_rows, [&](auto rows, int64_t r) {
      float scores[rows() * kBatchKeys];
      score_keys<T, rows()>(now, r == 0 ? next : kNoKeys, q + r * stride, stride, head_dim, scores);
      for (int i = 0; i < rows() * kBatchKeys; i += kLanes) {
        if (i % kBatchKeys < now.count) {
          visit(r + i / kBatchKeys, j + i % kBatchKeys, load(scores + i));
        }
      }
    });
  }
}

template <class T>
static void score_hip_keys(const std::byte* queries, int64_t num_rows, int64_t head_dim,
                           const void* const* keys, int64_t count, float* best) {
  const float* q = reinterpret_cast<const float*>(queries);
  const float* origins = q + num_rows * decode_q_stride(head_dim);
  std::fill(best, best + (count + kBatchKeys - 1) / kBatchKeys * kBatchKeys, kMinusInfinity);
  hip_products<T>(q, num_rows, head_dim, keys, count, [&](int64_t row, int64_t j, auto products) {
    store(best + j, maximum(products - broadcast(origins[row]), load(best + j)));
  });
}

template <class T>
static void set_hip_origins(std::byte* queries, int64_t num_rows, int64_t head_dim,
                            const void* const* keys, int64_t count) {
  const float* q = reinterpret_cast<const float*>(queries);
  float* origins = reinterpret_cast<float*>(queries) + num_rows * decode_q_stride(head_dim);
  std::fill(origins, origins + num_rows, kMinusInfinity);
  hip_products<T>(q, num_rows, head_dim, keys, count, [&](int64_t row, int64_t, auto products) {
    origins[row] = std::max(origins[row], reduce_max(products));
  });
  for (int64_t r = 0; r < num_rows; ++r) {
    if (!(std::abs(origins[r]) < -kMinusInfinity)) origins[r] = 0.0f;
  }
}

template <class T>
static constexpr HipKernel kFmaHip = {
    .query_bytes = hip_query_bytes,
    .prepare_queries = prepare_hip_queries<T>,
    .set_origins = set_hip_origins<T>,
    .score = score_hip_keys<T>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

static constexpr ByDType<HipKernel> kFmaHips = {
    .float32 = &kFmaHip<float>,
    .bfloat16 = &kFmaHip<BFloat16>,
    .float16 = &kFmaHip<Float16>,
};

template <class T>
static constexpr MeanKernel kMean = {.run = mean_of_rows<T>};

static constexpr ByDType<MeanKernel> kMeans = {
    .float32 = &kMean<float>,
    .bfloat16 = &kMean<BFloat16>,
    .float16 = &kMean<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
