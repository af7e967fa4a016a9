// The layout and the scalars that all attention ops take, in the order of their schemas.
#pragma once

#include "bindings/tensors.h"

namespace sparse_attn {

struct LayoutArguments {
  const Tensor &sink, &window;
  const std::optional<Tensor>&kv_num_blocks, &kv_indices, &num_columns, &column_indices;
  const std::optional<Tensor>&sink_logits, &key_bias, &alibi_slopes;
  int64_t block_q, block_kv, column_group;
  double scale, softcap;
  bool is_causal;
};

// Checks the arguments against the sizes in `params` and describes them there.
void describe_layout(const LayoutArguments& layout, AttentionParams& params);

// An op names them once as parameters, in the place where its schema has them, and once as a whole.
#define SPARSE_ATTN_LAYOUT_PARAMETERS                                                        \
  const Tensor &sink, const Tensor &window, const std::optional<Tensor>&kv_num_blocks,       \
      const std::optional<Tensor>&kv_indices, const std::optional<Tensor>&num_columns,       \
      const std::optional<Tensor>&column_indices, const std::optional<Tensor>&sink_logits,   \
      const std::optional<Tensor>&key_bias, const std::optional<Tensor>&alibi_slopes,        \
      int64_t block_q, int64_t block_kv, int64_t column_group, double scale, double softcap, \
      bool is_causal
#define SPARSE_ATTN_LAYOUT                                                                       \
  LayoutArguments {                                                                              \
    sink, window, kv_num_blocks, kv_indices, num_columns, column_indices, sink_logits, key_bias, \
        alibi_slopes, block_q, block_kv, column_group, scale, softcap, is_causal                 \
  }

}  // namespace sparse_attn
