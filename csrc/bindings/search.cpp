// The ops that choose key blocks.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/execution.h"
#include "bindings/tensors.h"
#include "cpu/search/hip.h"
#include "cpu/search/infinite_hip.h"
#include "cpu/search/top_blocks.h"
#include "integers.h"

namespace sparse_attn {

namespace {

void require_size(int64_t value, const char* name, int64_t low) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require(value >= low && value <= kMost, name, " must be ", low, " to ", kMost, ", but is ",
          value);
}

std::tuple<Tensor, Tensor> hip_select(const Tensor& q, const Tensor& k, int64_t slots,
                                      int64_t block_q, int64_t block_k, int64_t stride_q,
                                      int64_t stride_k, int64_t representatives, int64_t sink,
                                      int64_t window, bool strict, bool is_causal) {
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
  describe_qk(q, k, params);
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
  params.width = std::min(slots, ceil_div(params.seqlen_kv, block_k));
  const int64_t heads = params.num_heads, rows = params.num_rows(), width = params.width;
  Tensor counts = empty_strided<3>({params.batch, heads, rows}, {heads * rows, rows, 1},
                                   aoti_torch_dtype_int32());
  Tensor indices =
      empty_strided<4>({params.batch, heads, rows, width},
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
  for (const auto& [value, name, low] :
       {std::tuple(parent, "parent", 1), std::tuple(chunk, "chunk", 1),
        std::tuple(slots, "slots", 1), std::tuple(stride_q, "stride_q", 1),
        std::tuple(block_q, "block_q", 1), std::tuple(sink, "sink", 0),
        std::tuple(window, "window", 0), std::tuple(behind, "behind", 0)}) {
    require_size(value, name, low);
  }
  require(parent % chunk == 0, "parent: ", parent, " is no multiple of chunk = ", chunk);
  cpu::InfiniteHipParams params;
  describe_qk(q, k, params);
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
  const IndexLists listed = describe_lists(counts, "counts", indices, "indices", rows, params);
  if (listed.present()) {
    require(listed.batch == params.batch && listed.heads == groups, "counts has shape ",
            shape_of(*counts), ", it must be [", params.batch, ", ", groups, ", ", rows, "]");
    params.listed_counts = listed.counts;
    params.listed_indices = listed.indices;
    params.listed_width = listed.width;
  }
  params.width = std::min(slots, ceil_div(params.seqlen_kv, chunk));
  const int64_t width = params.width;
  Tensor found_counts = empty_strided<3>({params.batch, groups, rows}, {groups * rows, rows, 1},
                                         aoti_torch_dtype_int32());
  Tensor found =
      empty_strided<4>({params.batch, groups, rows, width},
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
  params.scores = float_data(scores);
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

}  // namespace

}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("hip_select", TORCH_BOX(&sparse_attn::hip_select));
  m.impl("infinite_hip_stage", TORCH_BOX(&sparse_attn::infinite_hip_stage));
  m.impl("top_blocks", TORCH_BOX(&sparse_attn::top_blocks));
}
