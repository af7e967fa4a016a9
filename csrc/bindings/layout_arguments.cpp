#include "bindings/layout_arguments.h"

#include <tuple>

#include "integers.h"

namespace sparse_attn {

namespace {

void describe_key_bias(const Tensor& bias, AttentionParams& params) {
  require_shape(bias, "key_bias", 3);
  require(bias.scalar_type() == ScalarType::Float, "key_bias must be float32");
  const int64_t batch = bias.size(0);
  require(batch == 1 || batch == params.batch, "key_bias has batch size ", batch, ", but q has ",
          params.batch);
  require_heads(bias.size(1), "key_bias", params);
  require(bias.size(2) == params.seqlen_kv, "key_bias has ", bias.size(2),
          " keys, but the layout has ", params.seqlen_kv);
  params.key_bias.data = float_data(bias);
  params.key_bias.is_shared = batch == 1;
  params.key_bias.stride = {batch == 1 ? 0 : bias.stride(0), bias.stride(1), bias.stride(2)};
  params.key_bias.heads = bias.size(1);
}

// One float32 number for each head of q.
void require_per_head(const Tensor& tensor, const char* name, const AttentionParams& params) {
  require_shape(tensor, name, 1);
  require(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  require(tensor.size(0) == params.num_heads, name, " has ", tensor.size(0), " entries, but q has ",
          params.num_heads, " heads");
}

}  // namespace

void describe_layout(const LayoutArguments& layout, AttentionParams& params) {
  constexpr int64_t kMaxBlock = std::numeric_limits<int32_t>::max();
  const auto [block_q, block_kv, group] =
      std::tuple(layout.block_q, layout.block_kv, layout.column_group);
  require(block_q >= 1 && block_q <= kMaxBlock, "block_q must be positive, but is ", block_q);
  require(block_kv >= 1 && block_kv <= kMaxBlock, "block_kv must be positive, but is ", block_kv);
  require(group >= 1 && group <= kMaxBlock, "column_group must be positive, but is ", group);
  require(layout.softcap >= 0, "softcap must not be negative, but is ", layout.softcap);
  params.block_q = block_q;
  params.block_kv = block_kv;
  params.column_group = group;
  params.scale = static_cast<float>(layout.scale);
  // No cap that is there becomes 0, which stands for none.
  params.softcap = static_cast<float>(layout.softcap);
  if (layout.softcap > 0 && params.softcap == 0) params.softcap = 0x1p-149f;
  params.is_causal = layout.is_causal;
  params.sink = describe_per_head(layout.sink, "sink", params);
  params.window = describe_per_head(layout.window, "window", params);
  const int64_t query_blocks = ceil_div(params.seqlen_q, block_q);
  params.blocks = describe_lists(layout.kv_num_blocks, "kv_num_blocks", layout.kv_indices,
                                 "kv_indices", query_blocks, params);
  params.columns = describe_lists(layout.num_columns, "num_columns", layout.column_indices,
                                  "column_indices", ceil_div(query_blocks, group), params);
  if (layout.sink_logits.has_value()) {
    const Tensor& logits = *layout.sink_logits;
    require_per_head(logits, "sink_logits", params);
    require(logits.is_contiguous(), "sink_logits must be contiguous");
    params.sink_logits = float_data(logits);
  }
  if (layout.key_bias.has_value()) describe_key_bias(*layout.key_bias, params);
  if (layout.alibi_slopes.has_value()) {
    require_per_head(*layout.alibi_slopes, "alibi_slopes", params);
    params.alibi_slopes = float_data(*layout.alibi_slopes);
    params.alibi_stride = layout.alibi_slopes->stride(0);
  }
}

}  // namespace sparse_attn
