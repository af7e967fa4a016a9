// The forward and the backward op.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "bindings/execution.h"
#include "bindings/layout_arguments.h"
#include "cpu/backward/backward.h"
#include "cpu/forward/forward.h"

namespace sparse_attn {

namespace {

Tensor allocate_out(const Tensor& q, const ForwardParams& params) {
  const int64_t heads = params.num_heads, rows = params.seqlen_q, dim = params.head_dim_v;
  const bool rows_first = q.stride(1) < q.stride(2);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  return empty_strided<4>(
      {params.batch, heads, rows, dim},
      {heads * rows * dim, (rows_first ? 1 : rows) * dim, (rows_first ? heads : 1) * dim, 1},
      dtype);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     SPARSE_ATTN_LAYOUT_PARAMETERS, bool split_float32,
                                     bool for_gradients) {
  ForwardParams params;
  params.split_float32 = split_float32;
  params.for_gradients = for_gradients;
  describe_qkv(q, k, v, params);
  describe_layout(SPARSE_ATTN_LAYOUT, params);
  Tensor out = allocate_out(q, params);
  Tensor lse = empty_strided<3>({params.batch, params.num_heads, params.seqlen_q},
                                {params.num_heads * params.seqlen_q, params.seqlen_q, 1},
                                aoti_torch_dtype_float32());
  params.out = writable(out, params.dtype);
  params.streams_out = cpu::is_streamed(out.numel() * element_size(params.dtype));
  params.out_stride = {out.stride(0), out.stride(1), out.stride(2)};
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride = params.seqlen_q;
  cpu::forward(params, active_isa(), torch_threads());
  return {out, lse};
}

// A gradient or result of the forward op: [batch, num_heads, seqlen_q] or one dimension more.
void require_rows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t last_dim,
                  const AttentionParams& params) {
  require_shape(tensor, name, last_dim == 0 ? 3 : 4);
  require(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  require(tensor.size(0) == params.batch && tensor.size(1) == params.num_heads &&
              tensor.size(2) == params.seqlen_q && (last_dim == 0 || tensor.size(3) == last_dim),
          name, " has shape ", shape_of(tensor), ", which does not match q and v");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             SPARSE_ATTN_LAYOUT_PARAMETERS) {
  BackwardParams params;
  describe_qkv(q, k, v, params);
  describe_layout(SPARSE_ATTN_LAYOUT, params);
  require_rows(dout, "dout", q.scalar_type(), params.head_dim_v, params);
  require_rows(out, "out", q.scalar_type(), params.head_dim_v, params);
  require_rows(dlse, "dlse", ScalarType::Float, 0, params);
  require_rows(lse, "lse", ScalarType::Float, 0, params);
  const bool unit_stride = dout.stride(3) == 1;
  const Tensor dout_rows = unit_stride ? dout : torch::stable::contiguous(dout);
  const Tensor dlse_rows = torch::stable::contiguous(dlse);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  params.dout = dout_rows.const_data_ptr();
  params.dout_stride = strides_of(dout_rows, "dout");
  params.dlse = float_data(dlse_rows);
  params.out = out.const_data_ptr();
  params.out_stride = strides_of(out, "out");
  params.lse = float_data(lse_rows);

  const auto [batch, heads, kv_heads] =
      std::tuple(params.batch, params.num_heads, params.num_kv_heads);
  Tensor dq = torch::stable::new_empty(q, {batch, heads, params.seqlen_q, params.head_dim});
  Tensor dk = torch::stable::new_empty(q, {batch, kv_heads, params.seqlen_kv, params.head_dim});
  Tensor dv = torch::stable::new_empty(q, {batch, kv_heads, params.seqlen_kv, params.head_dim_v});
  const auto gradient_of = [&](const std::optional<Tensor>& given, float*& data) {
    std::vector<int64_t> shape(1);
    if (given.has_value()) {
      shape.resize(given->dim());
      for (int64_t i = 0; i < given->dim(); ++i) shape[i] = given->size(i);
    }
    Tensor gradient = torch::stable::new_empty(q, shape, ScalarType::Float);
    if (given.has_value()) data = static_cast<float*>(gradient.mutable_data_ptr());
    return gradient;
  };
  Tensor dsink_logits = gradient_of(sink_logits, params.dsink_logits);
  Tensor dkey_bias = gradient_of(key_bias, params.dkey_bias);
  Tensor dalibi_slopes = gradient_of(alibi_slopes, params.dalibi_slopes);
  params.dq = writable(dq, params.dtype);
  params.dk = writable(dk, params.dtype);
  params.dv = writable(dv, params.dtype);
  cpu::backward(params, active_isa(), torch_threads());
  return {dq, dk, dv, dsink_logits, dkey_bias, dalibi_slopes};
}

}  // namespace

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention", TORCH_BOX(&sparse_attn::attention));
  m.impl("attention_backward", TORCH_BOX(&sparse_attn::attention_backward));
}
