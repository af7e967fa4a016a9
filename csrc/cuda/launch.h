// Turns a call of params.h into a launch of the kernel that serves it. The same code launches on a
// GPU and in the emulator.
#pragma once

#include <algorithm>

#include "cuda/forward.h"

namespace sparse_attn::cuda {

// Why the kernels cannot run a call, or null.
inline const char* refusal_of(const ForwardParams& params) {
  const auto is_aligned = [](const void* data, const Strides& stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride.batch % 8 == 0 &&
           stride.head % 8 == 0 && stride.row % 8 == 0;
  };
  const auto covers = [](const IndexLists& lists, int64_t rows) {
    return !lists.present() || lists.rows >= rows;
  };
  const int64_t block_rows = (params.seqlen_q + params.block_q - 1) / params.block_q;
  if (params.dtype == DType::kFloat32) return "float32 has no CUDA kernel";
  if (params.pages != nullptr) return "paged keys have no CUDA kernel";
  if (params.head_dim > 128 || params.head_dim_v > 128) return "head_dim is larger than 128";
  if (params.head_dim % 8 != 0 || params.head_dim_v % 8 != 0) {
    return "head_dim is not a multiple of 8";
  }
  if (!is_aligned(params.q, params.q_stride) || !is_aligned(params.k, params.k_stride) ||
      !is_aligned(params.v, params.v_stride) || !is_aligned(params.out, params.out_stride)) {
    return "rows of q, k, v and out do not begin at multiples of 16 bytes";
  }
  if (params.seqlen_q > kMaxLength || params.seqlen_kv > kMaxLength) return "sequence too long";
  if (!covers(params.blocks, block_rows)) return "block lists lack rows";
  if (!covers(params.columns, (block_rows + params.column_group - 1) / params.column_group)) {
    return "column lists lack rows";
  }
  return nullptr;
}

inline Lists lists_of(const IndexLists& lists, int64_t num_heads, int64_t rows_each) {
  Lists result;
  if (!lists.present()) return result;
  result.counts = Global<const int32_t>(lists.counts);
  result.indices = Global<const int32_t>(lists.indices);
  result.group = static_cast<int>(num_heads / lists.heads);
  result.heads = static_cast<int>(lists.heads);
  result.rows = static_cast<int>(lists.rows);
  result.width = static_cast<int>(lists.width);
  result.rows_each = static_cast<int>(rows_each);
  result.is_shared = lists.batch == 1;
  return result;
}

inline ScoreArguments score_arguments_of(const ForwardParams& params) {
  constexpr float kMostScale = 0x1p100f;
  ScoreArguments scores;
  scores.scale = params.scale;
  scores.softcap = params.softcap;
  scores.is_plain =
      params.softcap == 0 && !params.is_biased() && params.scale > 0 && params.scale < kMostScale;
  scores.factor = scores.is_plain ? params.scale * kLog2E : kLog2E;
  scores.sink_logits = Global<const float>(params.sink_logits);
  scores.alibi_slopes = Global<const float>(params.alibi_slopes);
  scores.slope_stride = params.alibi_stride;
  scores.key_bias = Global<const float>(params.key_bias.data);
  scores.bias_stride = params.key_bias.stride;
  scores.bias_group = static_cast<int>(params.num_heads / params.key_bias.heads);
  return scores;
}

template <class Element>
ForwardArguments<Element> arguments_of(const ForwardParams& params) {
  const auto head_values = [&](const PerHead& x) {
    return HeadValues{Global<const int32_t>(x.data), static_cast<int>(params.num_heads / x.heads)};
  };
  ForwardArguments<Element> arguments;
  arguments.q = Global<const Element>(static_cast<const Element*>(params.q));
  arguments.k = Global<const Element>(static_cast<const Element*>(params.k));
  arguments.v = Global<const Element>(static_cast<const Element*>(params.v));
  arguments.out = Global<Element>(static_cast<Element*>(params.out));
  arguments.lse = Global<float>(params.lse);
  arguments.q_stride = params.q_stride;
  arguments.k_stride = params.k_stride;
  arguments.v_stride = params.v_stride;
  arguments.out_stride = params.out_stride;
  arguments.lse_stride = params.lse_stride;
  arguments.num_heads = static_cast<int>(params.num_heads);
  arguments.kv_group = static_cast<int>(params.num_heads / params.num_kv_heads);
  arguments.seqlen_q = static_cast<int>(params.seqlen_q);
  arguments.seqlen_kv = static_cast<int>(params.seqlen_kv);
  arguments.chunks = static_cast<int>(params.head_dim / 8);
  arguments.chunks_v = static_cast<int>(params.head_dim_v / 8);
  arguments.sink = head_values(params.sink);
  arguments.window = head_values(params.window);
  // A block larger than the sequence holds all of it.
  const int64_t rows = std::max<int64_t>(params.seqlen_q, 1);
  const int64_t block_q = std::min(params.block_q, rows);
  const int64_t column_rows = std::min(block_q * std::min(params.column_group, rows), rows);
  arguments.block_kv =
      Divisor(static_cast<int>(std::min(params.block_kv, std::max<int64_t>(params.seqlen_kv, 1))));
  arguments.blocks = lists_of(params.blocks, params.num_heads, block_q);
  arguments.columns = lists_of(params.columns, params.num_heads, column_rows);
  arguments.row_block = static_cast<int>(params.blocks.present()    ? block_q
                                         : params.columns.present() ? column_rows
                                                                    : rows);
  constexpr int kRows = Forward<Element, 64>::Layout::kRows;
  arguments.tiles_each = (arguments.row_block + kRows - 1) / kRows;
  arguments.row_tiles =
      (arguments.seqlen_q + arguments.row_block - 1) / arguments.row_block * arguments.tiles_each;
  arguments.scores = score_arguments_of(params);
  arguments.is_causal = params.is_causal;
  return arguments;
}

template <class Element>
const char* launch_forward(const ForwardParams& params, Stream stream) {
  const ForwardArguments<Element> arguments = arguments_of<Element>(params);
  const int64_t blocks = params.batch * params.num_heads * arguments.row_tiles;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7FFFFFFF) return "too many rows for one launch";
  const int num_blocks = static_cast<int>(blocks);
  if (params.head_dim <= 64 && params.head_dim_v <= 64) {
    return launch<Forward<Element, 64>>(num_blocks, arguments, stream);
  }
  return launch<Forward<Element, 128>>(num_blocks, arguments, stream);
}

// Returns what went wrong, or null.
inline const char* forward(const ForwardParams& params, Stream stream) {
  if (const char* refusal = refusal_of(params)) return refusal;
  return params.dtype == DType::kBFloat16 ? launch_forward<BFloat16>(params, stream)
                                          : launch_forward<Float16>(params, stream);
}

}  // namespace sparse_attn::cuda
