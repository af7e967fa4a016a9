#include "bindings/layout_arguments.h"

#include <tuple>

#include "integers.h"

namespace sparse_attn {

void describe_layout(const LayoutArguments& layout, AttentionParams& params) {
  require(!layout.key_bias.has_value(), "the C++ kernels do not serve key_bias");
  require(!layout.alibi_slopes.has_value(), "the C++ kernels do not serve alibi_slopes");
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
    require_shape(logits, "sink_logits", 1);
    require(logits.scalar_type() == ScalarType::Float, "sink_logits must be float32");
    require(logits.is_contiguous(), "sink_logits must be contiguous");
    require(logits.size(0) == params.num_heads, "sink_logits has ", logits.size(0),
            " entries, but q has ", params.num_heads, " heads");
    params.sink_logits = float_data(logits);
  }
}

}  // namespace sparse_attn
