// Plain descriptions of one attention call: raw pointers, strides in elements, sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_attn {

inline constexpr int64_t kMaxHeadDim = 256;

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const std::byte* byte_offset(const void* base, int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(base) + elements * element_size(dtype);
}

// Strides of a [batch, head, row, dim] tensor whose last stride is 1.
struct Strides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

// int32 [heads]; head h reads entry h / (num_heads / heads).
struct PerHead {
  const int32_t* data = nullptr;
  int64_t heads = 1;
};

// float32 [batch, heads, keys], added to the scores of keys; query head h reads head
// h / (num_heads / heads). Absent when data is null.
struct KeyBias {
  const float* data = nullptr;
  Strides stride;  // a key is a row
  int64_t heads = 1;
  bool is_shared = false;  // by the whole batch: then the stride of a batch is 0
};

// Contiguous counts [batch, heads, rows] and indices [batch, heads, rows, width].
// Absent when counts is null.
struct IndexLists {
  const int32_t* counts = nullptr;
  const int32_t* indices = nullptr;
  int64_t batch = 1;
  int64_t heads = 1;
  int64_t rows = 0;
  int64_t width = 0;

  bool present() const { return counts != nullptr; }
};

// q and k of one call.
struct QkParams {
  const void* q = nullptr;
  const void* k = nullptr;
  Strides q_stride, k_stride;
  DType dtype = DType::kFloat32;

  int64_t batch = 0, num_heads = 0, num_kv_heads = 0;
  int64_t seqlen_q = 0, seqlen_kv = 0, head_dim = 0;
};

// How a product of q and k becomes a score. Calls hand it on to their tiles and rows as a whole.
struct ScoreParams {
  float scale = 1.0f;
  float softcap = 0.0f;

  void score_as(const ScoreParams& other) { *this = other; }

  // Whether scale and softcap are so far from the ends of float32 that scores need no care.
  bool has_ordinary_scale() const {
    constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;
    const auto is_ordinary = [](float x) { return x >= kLeast && x <= kMost; };
    const float size = scale < 0 ? -scale : scale;
    if (size == 0) return softcap == 0 || is_ordinary(softcap);
    return is_ordinary(size) && (softcap == 0 || is_ordinary(size / softcap));
  }
};

// What the forward and the backward pass are given.
struct AttentionParams : QkParams, ScoreParams {
  const void* v = nullptr;
  Strides v_stride;
  int64_t head_dim_v = 0;

  // Keys in pages: key j is row j % page_size of page pages[j / page_size], and the batch strides
  // of k and v lead from one page to the next. Null: the rows follow each other.
  const int32_t* pages = nullptr;
  int64_t page_size = 1;

  PerHead sink, window;
  IndexLists blocks;   // rows are query blocks, values are key blocks
  IndexLists columns;  // rows are groups of column_group query blocks, values are keys
  int64_t block_q = 1, block_kv = 1, column_group = 1;

  const float* sink_logits = nullptr;  // [num_heads] learnable logits, or null
  KeyBias key_bias;
  const float* alibi_slopes = nullptr;  // one for each of num_heads, or null
  int64_t alibi_stride = 1;
  bool is_causal = false;

  // Whether anything is added to scores after the softcap.
  bool is_biased() const { return key_bias.data != nullptr || alibi_slopes != nullptr; }

  // Where key j lies in k or v, in elements from the first row of its KV head.
  int64_t key_offset(const Strides& stride, int64_t j) const {
    if (pages == nullptr) return j * stride.row;
    return pages[j / page_size] * stride.batch + j % page_size * stride.row;
  }
};

struct ForwardParams : AttentionParams {
  bool split_float32 = false;  // float32 may be multiplied as the sum of two bfloat16
  bool for_gradients = false;  // scores are rounded as the backward pass rounds them
  bool streams_out = false;    // out is too large for the caches, and may be written past them

  void* out = nullptr;
  Strides out_stride;
  float* lse = nullptr;  // [batch, num_heads, seqlen_q], dense but for the stride of a head
  int64_t lse_stride = 0;
};

// The gradients are contiguous.
struct BackwardParams : AttentionParams {
  const void* out = nullptr;
  const void* dout = nullptr;
  Strides out_stride, dout_stride;
  const float* lse = nullptr;   // contiguous [batch, num_heads, seqlen_q]
  const float* dlse = nullptr;  // like lse

  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  float* dsink_logits = nullptr;   // [num_heads], or null without sink logits
  float* dkey_bias = nullptr;      // [1 or batch, heads of key_bias, seqlen_kv], or null without
  float* dalibi_slopes = nullptr;  // [num_heads], or null without slopes
};

}  // namespace sparse_attn
