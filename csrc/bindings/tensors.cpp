#include "bindings/tensors.h"

#include "cpu/runtime/huge_pages.h"

namespace sparse_attn {

std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  text << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    text << (i == 0 ? "" : ", ") << shape.tensor.size(i);
  }
  return text << "]";
}

void require_shape(const Tensor& tensor, const char* name, int64_t dim) {
  require(tensor.is_cpu(), name, " must be a CPU tensor");
  require(tensor.dim() == dim, name, " must have ", dim, " dimensions, but has shape ",
          shape_of(tensor));
}

void require_int32(const Tensor& tensor, const char* name, int64_t dim) {
  require_shape(tensor, name, dim);
  require(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  require(tensor.is_contiguous(), name, " must be contiguous");
}

void require_dtype_of_q(const Tensor& tensor, const char* name, const Tensor& q) {
  require(tensor.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
}

void require_unit_stride(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  require(tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0, name,
          " must have unit stride in its last dimension");
}

void require_heads(int64_t heads, const char* name, const QkParams& params) {
  require(heads >= 1 && params.num_heads % heads == 0, name, " has ", heads,
          " heads, which do not divide the ", params.num_heads, " heads of q");
}

namespace {

void require_kv_heads(const QkParams& params) {
  require(params.num_heads == 0 ||
              (params.num_kv_heads > 0 && params.num_heads % params.num_kv_heads == 0),
          "k has ", params.num_kv_heads, " heads, which do not divide the ", params.num_heads,
          " heads of q");
}

void require_head_dim(int64_t dim, const char* name) {
  require(dim >= 1 && dim <= kMaxHeadDim, name, " must have a head dimension of 1 to ", kMaxHeadDim,
          ", but has ", dim);
}

}  // namespace

void require_heads_and_dims(const AttentionParams& params) {
  require_kv_heads(params);
  require_head_dim(params.head_dim, "q");
  require_head_dim(params.head_dim_v, "v");
}

DType dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      require(false, "q must be float32, bfloat16 or float16 for the CPU kernels");
      return DType::kFloat32;
  }
}

Strides strides_of(const Tensor& tensor, const char* name) {
  require_unit_stride(tensor, name);
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void describe_qk(const Tensor& q, const Tensor& k, QkParams& params) {
  require_shape(q, "q", 4);
  require_shape(k, "k", 4);
  params.dtype = dtype_of(q);
  require_dtype_of_q(k, "k", q);
  params.batch = q.size(0);
  params.num_heads = q.size(1);
  params.seqlen_q = q.size(2);
  params.head_dim = q.size(3);
  params.num_kv_heads = k.size(1);
  params.seqlen_kv = k.size(2);
  require(k.size(0) == params.batch && k.size(3) == params.head_dim, "k has shape ", shape_of(k),
          ", which does not match q of shape ", shape_of(q));
  require_kv_heads(params);
  require_head_dim(params.head_dim, "q");
  require(params.seqlen_kv <= kMaxLength, "k has more than ", kMaxLength, " keys");
  require(params.seqlen_q <= kMaxLength, "q has more than ", kMaxLength, " rows");
  params.q_stride = strides_of(q, "q");
  params.k_stride = strides_of(k, "k");
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
}

void describe_qkv(const Tensor& q, const Tensor& k, const Tensor& v, AttentionParams& params) {
  describe_qk(q, k, params);
  require_shape(v, "v", 4);
  require_dtype_of_q(v, "v", q);
  require(v.size(0) == params.batch && v.size(1) == params.num_kv_heads &&
              v.size(2) == params.seqlen_kv,
          "v has shape ", shape_of(v), ", which does not match k of shape ", shape_of(k));
  params.head_dim_v = v.size(3);
  require_head_dim(params.head_dim_v, "v");
  params.v_stride = strides_of(v, "v");
  params.v = v.const_data_ptr();
}

PerHead describe_per_head(const Tensor& tensor, const char* name, const QkParams& params) {
  require_int32(tensor, name, 1);
  require_heads(tensor.size(0), name, params);
  return {int32_data(tensor), tensor.size(0)};
}

IndexLists describe_lists(const std::optional<Tensor>& counts, const char* counts_name,
                          const std::optional<Tensor>& indices, const char* indices_name,
                          int64_t rows, const QkParams& params) {
  require(counts.has_value() == indices.has_value(), counts_name, " and ", indices_name,
          " must be given together");
  if (!counts.has_value()) return {};
  require_int32(*counts, counts_name, 3);
  require_int32(*indices, indices_name, 4);
  IndexLists lists;
  lists.batch = counts->size(0);
  lists.heads = counts->size(1);
  lists.rows = rows;
  lists.width = indices->size(3);
  require(lists.batch == params.batch || lists.batch == 1, counts_name, " has batch size ",
          lists.batch, ", but q has ", params.batch);
  require_heads(lists.heads, counts_name, params);
  require(counts->size(2) == rows, counts_name, " has ", counts->size(2),
          " rows, but the layout has ", rows);
  require(indices->size(0) == lists.batch && indices->size(1) == lists.heads &&
              indices->size(2) == rows,
          indices_name, " has shape ", shape_of(*indices), ", which does not match ", counts_name,
          " of shape ", shape_of(*counts));
  // Empty tensors may have null pointers; a present list must not look absent.
  static const int32_t kNothing = 0;
  const void* data = counts->const_data_ptr();
  lists.counts = data != nullptr ? static_cast<const int32_t*>(data) : &kNothing;
  lists.indices = static_cast<const int32_t*>(indices->const_data_ptr());
  return lists;
}

void* writable(Tensor& tensor, DType dtype) {
  cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * element_size(dtype));
  return tensor.mutable_data_ptr();
}

}  // namespace sparse_attn
