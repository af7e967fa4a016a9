// The op for packed sequences and paged caches.
#include "cpu/forward/varlen.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/execution.h"
#include "bindings/layout_arguments.h"
#include "cpu/forward/forward.h"

namespace sparse_attn {

namespace {

// Tensors of packed sequences, or of sequences whose keys lie in pages.
struct SequenceArguments {
  const Tensor &q, &k, &v, &cu_seqlens_q;
  const std::optional<Tensor>&cu_seqlens_kv, &seqlens_kv, &block_table;
  int64_t max_seqlen_q, max_seqlen_kv;

  bool paged() const { return block_table.has_value(); }
  int kv_head_dimension() const { return paged() ? 2 : 1; }
};

void require_matching(const SequenceArguments& given) {
  const auto& [q, k, v] = std::tie(given.q, given.k, given.v);
  const bool paged = given.paged();
  require(paged == given.seqlens_kv.has_value() && paged != given.cu_seqlens_kv.has_value(),
          "give either cu_seqlens_kv, or block_table and seqlens_kv");
  require_shape(q, "q", 3);
  require_shape(k, "k", paged ? 4 : 3);
  require_shape(v, "v", paged ? 4 : 3);
  dtype_of(q);
  require_dtype_of_q(k, "k", q);
  require_dtype_of_q(v, "v", q);
  const int dim = given.kv_head_dimension() + 1;
  for (int i = 0; i < dim; ++i) {
    require(v.size(i) == k.size(i), "v has shape ", shape_of(v),
            ", which does not match k of shape ", shape_of(k));
  }
  require(k.size(dim) == q.size(2), "k has shape ", shape_of(k),
          ", which does not match q of shape ", shape_of(q));
}

// One layout serves all sequences, so the sizes are those of the greatest ones.
void describe_sizes(const SequenceArguments& given, AttentionParams& params) {
  const auto& [q, k, v, cu_seqlens_q] = std::tie(given.q, given.k, given.v, given.cu_seqlens_q);
  const int head = given.kv_head_dimension();
  params.dtype = dtype_of(q);
  params.batch = cu_seqlens_q.dim() == 1 ? cu_seqlens_q.size(0) - 1 : -1;
  require(params.batch >= 0, "cu_seqlens_q must be int32 [batch + 1]");
  params.num_heads = q.size(1);
  params.num_kv_heads = k.size(head);
  params.head_dim = q.size(2);
  params.head_dim_v = v.size(head + 1);
  params.seqlen_q = given.max_seqlen_q;
  params.seqlen_kv = given.max_seqlen_kv;
  require_heads_and_dims(params);
  require(params.seqlen_q >= 0 && params.seqlen_q <= kMaxLength, "max_seqlen_q is ",
          params.seqlen_q);
  require(params.seqlen_kv >= 0 && params.seqlen_kv <= kMaxLength, "max_seqlen_kv is ",
          params.seqlen_kv);
}

void describe_rows(const SequenceArguments& given, AttentionParams& params) {
  const auto& [q, k, v] = std::tie(given.q, given.k, given.v);
  require_unit_stride(q, "q");
  require_unit_stride(k, "k");
  require_unit_stride(v, "v");
  const int head = given.kv_head_dimension();
  const auto strides = [&](const Tensor& tensor) {
    const int64_t page = given.paged() ? tensor.stride(0) : 0;
    return Strides{page, tensor.stride(head), tensor.stride(head - 1)};
  };
  params.q_stride = {0, q.stride(1), q.stride(0)};
  params.k_stride = strides(k);
  params.v_stride = strides(v);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
}

// The values of an int32 vector of known size.
const int32_t* describe_vector(const Tensor& tensor, const char* name, int64_t size,
                               int64_t batch) {
  require_int32(tensor, name, 1);
  require(tensor.size(0) == size, name, " has ", tensor.size(0), " entries, but there are ", batch,
          " sequences");
  return int32_data(tensor);
}

cpu::Packing describe_packing(const SequenceArguments& given, AttentionParams& params) {
  const Tensor& k = given.k;
  const int64_t batch = params.batch;
  cpu::Packing packing;
  packing.total_q = given.q.size(0);
  packing.total_kv = k.size(0);
  packing.cu_seqlens_q = describe_vector(given.cu_seqlens_q, "cu_seqlens_q", batch + 1, batch);
  if (!given.paged()) {
    packing.cu_seqlens_kv =
        describe_vector(*given.cu_seqlens_kv, "cu_seqlens_kv", batch + 1, batch);
    return packing;
  }
  const Tensor& block_table = *given.block_table;
  packing.seqlens_kv = describe_vector(*given.seqlens_kv, "seqlens_kv", batch, batch);
  require_int32(block_table, "block_table", 2);
  require(block_table.size(0) == batch, "block_table has ", block_table.size(0),
          " rows, but there are ", batch, " sequences");
  require(k.size(1) >= 1, "k has pages without rows");
  packing.block_table = int32_data(block_table);
  packing.max_pages = block_table.size(1);
  params.page_size = k.size(1);
  return packing;
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q,
                                            const std::optional<Tensor>& cu_seqlens_kv,
                                            const std::optional<Tensor>& seqlens_kv,
                                            const std::optional<Tensor>& block_table,
                                            int64_t max_seqlen_q, int64_t max_seqlen_kv,
                                            SPARSE_ATTN_LAYOUT_PARAMETERS) {
  const SequenceArguments given = {
      q, k, v, cu_seqlens_q, cu_seqlens_kv, seqlens_kv, block_table, max_seqlen_q, max_seqlen_kv};
  require_matching(given);
  ForwardParams params;
  describe_sizes(given, params);
  describe_layout(SPARSE_ATTN_LAYOUT, params);
  describe_rows(given, params);
  const cpu::Packing packing = describe_packing(given, params);

  Tensor out = torch::stable::new_empty(q, {q.size(0), params.num_heads, params.head_dim_v});
  Tensor lse = torch::stable::new_empty(q, {params.num_heads, q.size(0)}, ScalarType::Float);
  params.out = writable(out, params.dtype);
  params.streams_out = cpu::is_streamed(out.numel() * element_size(params.dtype));
  params.out_stride = {0, params.head_dim_v, params.num_heads * params.head_dim_v};
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride = q.size(0);
  cpu::forward_varlen(params, packing, active_isa(), torch_threads());
  return {out, lse};
}

}  // namespace

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention_varlen", TORCH_BOX(&sparse_attn::attention_varlen));
}
