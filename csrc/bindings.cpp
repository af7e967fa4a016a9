// The torch side of the CPU kernels: checks tensors, describes them as plain structs, allocates the
// results. Only torch's stable ABI and Python's limited API are used.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/hip.h"
#include "cpu/huge_pages.h"
#include "cpu/infinite_hip.h"
#include "cpu/top_blocks.h"
#include "cpu/varlen.h"
#include "integers.h"
#include "require.h"

namespace sparse_attn {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<cpu::Isa>& active_isa() {
  static std::atomic<cpu::Isa> isa{cpu::best_isa()};
  return isa;
}

struct ShapeOf {
  const Tensor& tensor;
};

ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }

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
  require(tensor.stride(3) == 1 || tensor.size(3) <= 1 || tensor.numel() == 0, name,
          " must have unit stride in its last dimension");
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() / 2;

void require_heads_and_dims(const AttentionParams& params) {
  require(params.num_heads == 0 ||
              (params.num_kv_heads > 0 && params.num_heads % params.num_kv_heads == 0),
          "k has ", params.num_kv_heads, " heads, which do not divide the ", params.num_heads,
          " heads of q");
  require(params.head_dim >= 1 && params.head_dim <= kMaxHeadDim,
          "q must have a head dimension of 1 to ", kMaxHeadDim, ", but has ", params.head_dim);
  require(params.head_dim_v >= 1 && params.head_dim_v <= kMaxHeadDim,
          "v must have a head dimension of 1 to ", kMaxHeadDim, ", but has ", params.head_dim_v);
}

void describe_qkv(const Tensor& q, const Tensor& k, const Tensor& v, AttentionParams& params) {
  require_shape(q, "q", 4);
  require_shape(k, "k", 4);
  require_shape(v, "v", 4);
  params.dtype = dtype_of(q);
  require(k.scalar_type() == q.scalar_type(), "k must have the dtype of q");
  require(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  params.batch = q.size(0);
  params.num_heads = q.size(1);
  params.seqlen_q = q.size(2);
  params.head_dim = q.size(3);
  params.num_kv_heads = k.size(1);
  params.seqlen_kv = k.size(2);
  params.head_dim_v = v.size(3);
  require(k.size(0) == params.batch && k.size(3) == params.head_dim, "k has shape ", shape_of(k),
          ", which does not match q of shape ", shape_of(q));
  require(v.size(0) == params.batch && v.size(1) == params.num_kv_heads &&
              v.size(2) == params.seqlen_kv,
          "v has shape ", shape_of(v), ", which does not match k of shape ", shape_of(k));
  require_heads_and_dims(params);
  require(params.seqlen_kv <= kMaxLength, "k has more than ", kMaxLength, " keys");
  require(params.seqlen_q <= kMaxLength, "q has more than ", kMaxLength, " rows");
  params.q_stride = strides_of(q, "q");
  params.k_stride = strides_of(k, "k");
  params.v_stride = strides_of(v, "v");
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
}

void require_int32(const Tensor& tensor, const char* name, int64_t dim) {
  require_shape(tensor, name, dim);
  require(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  require(tensor.is_contiguous(), name, " must be contiguous");
}

void require_heads(int64_t heads, const char* name, const AttentionParams& params) {
  require(heads >= 1 && params.num_heads % heads == 0, name, " has ", heads,
          " heads, which do not divide the ", params.num_heads, " heads of q");
}

PerHead describe_per_head(const Tensor& tensor, const char* name, const AttentionParams& params) {
  require_int32(tensor, name, 1);
  require_heads(tensor.size(0), name, params);
  return {static_cast<const int32_t*>(tensor.const_data_ptr()), tensor.size(0)};
}

IndexLists describe_lists(const std::optional<Tensor>& counts, const char* counts_name,
                          const std::optional<Tensor>& indices, const char* indices_name,
                          int64_t rows, const AttentionParams& params) {
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

// An uninitialized CPU tensor, without the dispatcher.
template <int64_t kDim>
Tensor empty_strided(const std::array<int64_t, kDim>& sizes,
                     const std::array<int64_t, kDim>& strides, int32_t dtype) {
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDim, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

// Where a new tensor is going to be written.
void* writable(Tensor& tensor, DType dtype) {
  cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * element_size(dtype));
  return tensor.mutable_data_ptr();
}

// Whether a result is larger than what a core's second-level cache usually keeps.
bool is_streamed(const Tensor& out, DType dtype) {
  constexpr int64_t kKept = int64_t{2} << 20;
  return out.numel() * element_size(dtype) >= kKept;
}

Tensor allocate_out(const Tensor& q, const AttentionParams& params) {
  const int64_t heads = params.num_heads, rows = params.seqlen_q, dim = params.head_dim_v;
  const bool rows_first = q.stride(1) < q.stride(2);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  return empty_strided<4>(
      {params.batch, heads, rows, dim},
      {heads * rows * dim, (rows_first ? 1 : rows) * dim, (rows_first ? heads : 1) * dim, 1},
      dtype);
}

cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.num_threads = torch::stable::get_num_threads();
  parallel.run = [](int64_t n, const std::function<void(int64_t)>& f) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  };
  return parallel;
}

// The layout and the scalars, which both ops have in common.
struct LayoutArguments {
  const Tensor &sink, &window;
  const std::optional<Tensor>&kv_num_blocks, &kv_indices, &num_columns, &column_indices, &sinks;
  int64_t block_q, block_kv, column_group;
  double scale, softcap;
  bool is_causal;
};

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
  if (layout.sinks.has_value()) {
    const Tensor& sinks = *layout.sinks;
    require_shape(sinks, "sinks", 1);
    require(sinks.scalar_type() == ScalarType::Float, "sinks must be float32");
    require(sinks.is_contiguous(), "sinks must be contiguous");
    require(sinks.size(0) == params.num_heads, "sinks has ", sinks.size(0), " entries, but q has ",
            params.num_heads, " heads");
    params.sinks = static_cast<const float*>(sinks.const_data_ptr());
  }
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sink, const Tensor& window,
    const std::optional<Tensor>& kv_num_blocks, const std::optional<Tensor>& kv_indices,
    const std::optional<Tensor>& num_columns, const std::optional<Tensor>& column_indices,
    const std::optional<Tensor>& sinks, int64_t block_q, int64_t block_kv, int64_t column_group,
    double scale, double softcap, bool is_causal, bool split_float32, bool for_gradients) {
  AttentionParams params;
  params.split_float32 = split_float32;
  params.for_gradients = for_gradients;
  describe_qkv(q, k, v, params);
  describe_layout({sink, window, kv_num_blocks, kv_indices, num_columns, column_indices, sinks,
                   block_q, block_kv, column_group, scale, softcap, is_causal},
                  params);
  Tensor out = allocate_out(q, params);
  Tensor lse = empty_strided<3>({params.batch, params.num_heads, params.seqlen_q},
                                {params.num_heads * params.seqlen_q, params.seqlen_q, 1},
                                aoti_torch_dtype_float32());
  params.out = writable(out, params.dtype);
  params.streams_out = is_streamed(out, params.dtype);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& sink, const Tensor& window,
    const std::optional<Tensor>& kv_num_blocks, const std::optional<Tensor>& kv_indices,
    const std::optional<Tensor>& num_columns, const std::optional<Tensor>& column_indices,
    const std::optional<Tensor>& sinks, int64_t block_q, int64_t block_kv, int64_t column_group,
    double scale, double softcap, bool is_causal) {
  BackwardParams params;
  describe_qkv(q, k, v, params);
  describe_layout({sink, window, kv_num_blocks, kv_indices, num_columns, column_indices, sinks,
                   block_q, block_kv, column_group, scale, softcap, is_causal},
                  params);
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
  params.dlse = static_cast<const float*>(dlse_rows.const_data_ptr());
  params.out = const_cast<void*>(out.const_data_ptr());
  params.out_stride = strides_of(out, "out");
  params.lse = const_cast<float*>(static_cast<const float*>(lse_rows.const_data_ptr()));

  const auto [batch, heads, kv_heads] =
      std::tuple(params.batch, params.num_heads, params.num_kv_heads);
  Tensor dq = torch::stable::new_empty(q, {batch, heads, params.seqlen_q, params.head_dim});
  Tensor dk = torch::stable::new_empty(q, {batch, kv_heads, params.seqlen_kv, params.head_dim});
  Tensor dv = torch::stable::new_empty(q, {batch, kv_heads, params.seqlen_kv, params.head_dim_v});
  Tensor dsinks = torch::stable::new_empty(q, {sinks.has_value() ? heads : 0}, ScalarType::Float);
  params.dq = writable(dq, params.dtype);
  params.dk = writable(dk, params.dtype);
  params.dv = writable(dv, params.dtype);
  if (sinks.has_value()) params.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  cpu::backward(params, active_isa(), torch_threads());
  return {dq, dk, dv, dsinks};
}

// The values of an int32 vector of known size.
const int32_t* describe_vector(const Tensor& tensor, const char* name, int64_t size,
                               int64_t batch) {
  require_int32(tensor, name, 1);
  require(tensor.size(0) == size, name, " has ", tensor.size(0), " entries, but there are ", batch,
          " sequences");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor> attention_varlen(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_kv, const std::optional<Tensor>& seqlens_kv,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_kv,
    const Tensor& sink, const Tensor& window, const std::optional<Tensor>& kv_num_blocks,
    const std::optional<Tensor>& kv_indices, const std::optional<Tensor>& num_columns,
    const std::optional<Tensor>& column_indices, const std::optional<Tensor>& sinks,
    int64_t block_q, int64_t block_kv, int64_t column_group, double scale, double softcap,
    bool is_causal) {
  const bool paged = block_table.has_value();
  require(paged == seqlens_kv.has_value() && paged != cu_seqlens_kv.has_value(),
          "give either cu_seqlens_kv, or block_table and seqlens_kv");
  require_shape(q, "q", 3);
  require_shape(k, "k", paged ? 4 : 3);
  require_shape(v, "v", paged ? 4 : 3);
  AttentionParams params;
  params.dtype = dtype_of(q);
  require(k.scalar_type() == q.scalar_type(), "k must have the dtype of q");
  require(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  const int dim = paged ? 3 : 2;
  for (int i = 0; i < dim; ++i) {
    require(v.size(i) == k.size(i), "v has shape ", shape_of(v),
            ", which does not match k of shape ", shape_of(k));
  }
  require(k.size(dim) == q.size(2), "k has shape ", shape_of(k),
          ", which does not match q of shape ", shape_of(q));
  params.batch = cu_seqlens_q.dim() == 1 ? cu_seqlens_q.size(0) - 1 : -1;
  require(params.batch >= 0, "cu_seqlens_q must be int32 [batch + 1]");
  params.num_heads = q.size(1);
  params.num_kv_heads = k.size(dim - 1);
  params.head_dim = q.size(2);
  params.head_dim_v = v.size(dim);
  params.seqlen_q = max_seqlen_q;
  params.seqlen_kv = max_seqlen_kv;
  require_heads_and_dims(params);
  require(max_seqlen_q >= 0 && max_seqlen_q <= kMaxLength, "max_seqlen_q is ", max_seqlen_q);
  require(max_seqlen_kv >= 0 && max_seqlen_kv <= kMaxLength, "max_seqlen_kv is ", max_seqlen_kv);
  describe_layout({sink, window, kv_num_blocks, kv_indices, num_columns, column_indices, sinks,
                   block_q, block_kv, column_group, scale, softcap, is_causal},
                  params);
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    const int64_t last = tensor->dim() - 1;
    require(tensor->stride(last) == 1 || tensor->size(last) <= 1 || tensor->numel() == 0, name,
            " must have unit stride in its last dimension");
  }
  params.q_stride = {0, q.stride(1), q.stride(0)};
  params.k_stride = {paged ? k.stride(0) : 0, k.stride(dim - 1), k.stride(dim - 2)};
  params.v_stride = {paged ? v.stride(0) : 0, v.stride(dim - 1), v.stride(dim - 2)};

  const int64_t total_q = q.size(0), batch = params.batch;
  cpu::Packing packing;
  packing.total_q = total_q;
  packing.total_kv = k.size(0);
  packing.cu_seqlens_q = describe_vector(cu_seqlens_q, "cu_seqlens_q", batch + 1, batch);
  if (paged) {
    packing.seqlens_kv = describe_vector(*seqlens_kv, "seqlens_kv", batch, batch);
    require_int32(*block_table, "block_table", 2);
    require(block_table->size(0) == batch, "block_table has ", block_table->size(0),
            " rows, but there are ", batch, " sequences");
    require(k.size(1) >= 1, "k has pages without rows");
    packing.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    packing.max_pages = block_table->size(1);
    params.page_size = k.size(1);
  } else {
    packing.cu_seqlens_kv = describe_vector(*cu_seqlens_kv, "cu_seqlens_kv", batch + 1, batch);
  }

  Tensor out = torch::stable::new_empty(q, {total_q, params.num_heads, params.head_dim_v});
  Tensor lse = torch::stable::new_empty(q, {params.num_heads, total_q}, ScalarType::Float);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = writable(out, params.dtype);
  params.streams_out = is_streamed(out, params.dtype);
  params.out_stride = {0, params.head_dim_v, params.num_heads * params.head_dim_v};
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride = total_q;
  cpu::forward_varlen(params, packing, active_isa(), torch_threads());
  return {out, lse};
}

void describe_search(const AttentionParams& qk, cpu::SearchParams& params) {
  params.q = qk.q;
  params.k = qk.k;
  params.q_stride = qk.q_stride;
  params.k_stride = qk.k_stride;
  params.dtype = qk.dtype;
  params.batch = qk.batch;
  params.num_heads = qk.num_heads;
  params.num_kv_heads = qk.num_kv_heads;
  params.seqlen_q = qk.seqlen_q;
  params.seqlen_kv = qk.seqlen_kv;
  params.head_dim = qk.head_dim;
}

void require_size(int64_t value, const char* name, int64_t low) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require(value >= low && value <= kMost, name, " must be ", low, " to ", kMost, ", but is ",
          value);
}

std::tuple<Tensor, Tensor> hip_select(const Tensor& q, const Tensor& k, int64_t slots,
                                      int64_t block_q, int64_t block_k, int64_t stride_q,
                                      int64_t stride_k, int64_t representatives, int64_t sink,
                                      int64_t window, bool strict, bool is_causal) {
  AttentionParams qk;  // k stands for v, which is not read
  describe_qkv(q, k, k, qk);
  for (const auto& [value, name, low] :
       {std::tuple(slots, "slots", 1), std::tuple(block_q, "block_q", 1),
        std::tuple(block_k, "block_k", 1), std::tuple(stride_q, "stride_q", 1),
        std::tuple(stride_k, "stride_k", 1), std::tuple(sink, "sink", 0),
        std::tuple(window, "window", 0)}) {
    require_size(value, name, low);
  }
  require(representatives == 1 || representatives == 2, "representatives must be 1 or 2, but is ",
          representatives);
  require(stride_q <= block_q, "stride_q must not be more than block_q");
  require(stride_k <= block_k, "stride_k must not be more than block_k");
  cpu::HipParams params;
  describe_search(qk, params);
  params.slots = slots;
  params.block_q = block_q;
  params.block_k = block_k;
  params.stride_q = stride_q;
  params.stride_k = stride_k;
  params.representatives = representatives;
  params.sink = sink;
  params.window = window;
  params.strict = strict;
  params.is_causal = is_causal;
  params.width = std::min(slots, ceil_div(qk.seqlen_kv, block_k));
  const int64_t heads = qk.num_heads, rows = params.num_rows(), width = params.width;
  Tensor counts =
      empty_strided<3>({qk.batch, heads, rows}, {heads * rows, rows, 1}, aoti_torch_dtype_int32());
  Tensor indices =
      empty_strided<4>({qk.batch, heads, rows, width},
                       {heads * rows * width, rows * width, width, 1}, aoti_torch_dtype_int32());
  params.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  cpu::hip_select(params, active_isa(), torch_threads());
  return {counts, indices};
}

std::tuple<Tensor, Tensor> infinite_hip_stage(const Tensor& q, const Tensor& k,
                                              const std::optional<Tensor>& counts,
                                              const std::optional<Tensor>& indices, int64_t parent,
                                              int64_t chunk, int64_t slots, int64_t stride_q,
                                              int64_t block_q, int64_t sink, int64_t window,
                                              int64_t behind, bool shared, bool is_causal) {
  AttentionParams qk;  // k stands for v, which is not read
  describe_qkv(q, k, k, qk);
  for (const auto& [value, name, low] :
       {std::tuple(parent, "parent", 1), std::tuple(chunk, "chunk", 1),
        std::tuple(slots, "slots", 1), std::tuple(stride_q, "stride_q", 1),
        std::tuple(block_q, "block_q", 1), std::tuple(sink, "sink", 0),
        std::tuple(window, "window", 0), std::tuple(behind, "behind", 0)}) {
    require_size(value, name, low);
  }
  require(parent % chunk == 0, "parent: ", parent, " is no multiple of chunk = ", chunk);
  cpu::InfiniteHipParams params;
  describe_search(qk, params);
  params.parent = parent;
  params.chunk = chunk;
  params.slots = slots;
  params.stride_q = stride_q;
  params.block_q = block_q;
  params.sink = sink;
  params.window = window;
  params.behind = behind;
  params.shared = shared;
  params.is_causal = is_causal;
  const int64_t groups = params.groups(), rows = params.num_rows();
  const IndexLists listed = describe_lists(counts, "counts", indices, "indices", rows, qk);
  if (listed.present()) {
    require(listed.batch == qk.batch && listed.heads == groups, "counts has shape ",
            shape_of(*counts), ", it must be [", qk.batch, ", ", groups, ", ", rows, "]");
    params.listed_counts = listed.counts;
    params.listed_indices = listed.indices;
    params.listed_width = listed.width;
  }
  params.width = std::min(slots, ceil_div(qk.seqlen_kv, chunk));
  const int64_t width = params.width;
  Tensor found_counts = empty_strided<3>({qk.batch, groups, rows}, {groups * rows, rows, 1},
                                         aoti_torch_dtype_int32());
  Tensor found =
      empty_strided<4>({qk.batch, groups, rows, width},
                       {groups * rows * width, rows * width, width, 1}, aoti_torch_dtype_int32());
  params.counts = static_cast<int32_t*>(found_counts.mutable_data_ptr());
  params.indices = static_cast<int32_t*>(found.mutable_data_ptr());
  cpu::infinite_hip_stage(params, active_isa(), torch_threads());
  return {found_counts, found};
}

std::tuple<Tensor, Tensor> top_blocks(const Tensor& scores, int64_t top_k) {
  const int64_t dim = scores.dim();
  require(scores.is_cpu() && scores.scalar_type() == ScalarType::Float && scores.is_contiguous() &&
              dim >= 2,
          "scores must be a contiguous float32 CPU tensor of at least two dimensions");
  require(scores.size(-1) <= kMaxLength, "scores has more than ", kMaxLength, " blocks in a row");
  require(top_k >= 1, "top_k must be at least 1, but is ", top_k);
  cpu::TopBlocksParams params;
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.blocks = scores.size(-1);
  params.top_k = std::min(top_k, params.blocks);
  std::vector<int64_t> shape;
  params.rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) {
    shape.push_back(scores.size(i));
    params.rows *= scores.size(i);
  }
  Tensor counts = torch::stable::new_empty(scores, shape, ScalarType::Int);
  shape.push_back(params.top_k);
  Tensor indices = torch::stable::new_empty(scores, shape, ScalarType::Int);
  params.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  cpu::top_blocks(params, torch_threads());
  return {counts, indices};
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(cpu::isa_name(active_isa()));
}

PyObject* supported_cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (int level = 0; level < cpu::kNumIsas; ++level) {
    const cpu::Isa isa = static_cast<cpu::Isa>(level);
    if (!cpu::is_supported(isa)) continue;
    PyObject* name = PyUnicode_FromString(cpu::isa_name(isa));
    const int failed = name == nullptr || PyList_Append(names, name) != 0;
    Py_XDECREF(name);
    if (failed) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  PyObject* result = PyList_AsTuple(names);
  Py_DECREF(names);
  return result;
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  if (name == Py_None) {
    active_isa() = cpu::best_isa();
    Py_RETURN_NONE;
  }
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  for (int level = 0; level < cpu::kNumIsas; ++level) {
    const cpu::Isa isa = static_cast<cpu::Isa>(level);
    if (std::string(text) != cpu::isa_name(isa)) continue;
    if (!cpu::is_supported(isa)) {
      PyErr_Format(PyExc_ValueError, "this processor does not support '%s'", text);
      return nullptr;
    }
    active_isa() = isa;
    Py_RETURN_NONE;
  }
  std::string names = cpu::kIsaNames[0];
  for (int level = 1; level < cpu::kNumIsas; ++level) {
    names += (level + 1 < cpu::kNumIsas ? ", " : " or ") + std::string(cpu::kIsaNames[level]);
  }
  PyErr_Format(PyExc_ValueError, "unknown instruction set '%s': expected %s", text, names.c_str());
  return nullptr;
}

PyMethodDef kMethods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set that kernels may use now."},
    {"supported_cpu_isas", supported_cpu_isas, METH_NOARGS,
     "Names of all instruction sets that this processor supports and kernels exist for."},
    {"set_cpu_isa", set_cpu_isa, METH_O,
     "Limit kernels to the named instruction set; None means the best supported one."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention", TORCH_BOX(&sparse_attn::attention));
  m.impl("attention_backward", TORCH_BOX(&sparse_attn::attention_backward));
  m.impl("attention_varlen", TORCH_BOX(&sparse_attn::attention_varlen));
  m.impl("hip_select", TORCH_BOX(&sparse_attn::hip_select));
  m.impl("infinite_hip_stage", TORCH_BOX(&sparse_attn::infinite_hip_stage));
  m.impl("top_blocks", TORCH_BOX(&sparse_attn::top_blocks));
}

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&sparse_attn::kModule); }
