#include "cpu/backward/row_gradients.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/layout/candidates.h"

namespace sparse_attn::cpu {

namespace {

// Rows of floats, each padded with zeros, of which others of a dtype are read and written.
class FloatRows {
 public:
  FloatRows(int64_t rows, int64_t dim)
      : rows_(rows), dim_(dim), padded_(padded_row(dim)), data_(rows * padded_) {}

  float* row(int64_t i) { return data_.data() + i * padded_; }

  void read(const void* base, int64_t offset, int64_t stride, DType dtype,
            const RowGradientKernel& kernel) {
    const auto* source = static_cast<const std::byte*>(base);
    for (int64_t i = 0; i < rows_; ++i) {
      kernel.to_floats(source + (offset + i * stride) * element_size(dtype), dim_, row(i));
    }
  }
  // To rows that follow each other; `offset` is that of the first, in rows.
  void write(void* base, int64_t offset, DType dtype, const RowGradientKernel& kernel) {
    auto* dest = static_cast<std::byte*>(base);
    for (int64_t i = 0; i < rows_; ++i) {
      kernel.from_floats(row(i), dim_, dest + (offset + i) * dim_ * element_size(dtype));
    }
  }

 private:
  int64_t rows_, dim_, padded_;
  std::vector<float> data_;
};

void find_keys(const AttentionParams& params, const TileIndex& row, std::vector<int32_t>& keys) {
  CandidateWalk walk(params, row);
  Candidates found;
  keys.clear();
  while (walk.next(found)) {
    for (uint32_t bits = found.all(); bits != 0; bits &= bits - 1) {
      keys.push_back(static_cast<int32_t>(found.begin + std::countr_zero(bits)));
    }
  }
}

}  // namespace

void gradients_by_rows(const BackwardParams& params, Isa isa, int64_t kv_head, double* dsink_logits,
                       BiasGradients& bias_gradients) {
  const DType dtype = params.dtype;
  const RowGradientKernel& kernel = find_kernel(isa, &Kernels::row_gradients, dtype);
  const int64_t group = params.num_heads / params.num_kv_heads, seqlen_kv = params.seqlen_kv;
  const int64_t batch = kv_head / params.num_kv_heads, key_head = kv_head % params.num_kv_heads;
  const auto offset = [&](const Strides& stride, int64_t head, int64_t row) {
    return batch * stride.batch + head * stride.head + row * stride.row;
  };
  FloatRows k(seqlen_kv, params.head_dim), dk(seqlen_kv, params.head_dim);
  FloatRows v(seqlen_kv, params.head_dim_v), dv(seqlen_kv, params.head_dim_v);
  FloatRows q(1, params.head_dim), dq(1, params.head_dim), dout(1, params.head_dim_v);
  k.read(params.k, offset(params.k_stride, key_head, 0), params.k_stride.row, dtype, kernel);
  v.read(params.v, offset(params.v_stride, key_head, 0), params.v_stride.row, dtype, kernel);
  std::vector<int32_t> keys;
  std::vector<float> scratch(row_gradient_floats(seqlen_kv));
  std::vector<double> dbias(params.is_biased() ? seqlen_kv : 0);
  RowGradients row;
  row.dim = padded_row(params.head_dim);
  row.dim_v = padded_row(params.head_dim_v);
  row.q = q.row(0);
  row.dout = dout.row(0);
  row.k = k.row(0);
  row.v = v.row(0);
  row.score_as(params);
  row.scratch = scratch.data();
  row.dq = dq.row(0);
  row.dk = dk.row(0);
  row.dv = dv.row(0);
  row.dbias = dbias.data();
  for (int64_t i = 0; i < group; ++i) {
    const int64_t head = key_head * group + i;
    if (params.sink_logits != nullptr) row.sink_logit = params.sink_logits + head;
    dsink_logits[i] = 0;
    std::fill(dbias.begin(), dbias.end(), 0.0);
    row.dslope = 0;
    for (int64_t r = 0; r < params.seqlen_q; ++r) {
      const int64_t place = (batch * params.num_heads + head) * params.seqlen_q + r;
      find_keys(params, {batch, head, r, 1}, keys);
      row.keys = keys.data();
      row.num_keys = static_cast<int64_t>(keys.size());
      row.dlse = params.dlse[place];
      q.read(params.q, offset(params.q_stride, head, r), 0, dtype, kernel);
      dout.read(params.dout, offset(params.dout_stride, head, r), 0, dtype, kernel);
      const HeadBias bias(params, batch, head, r + seqlen_kv - params.seqlen_q);
      if (params.is_biased()) row.bias = &bias;
      kernel.run(row);
      dq.write(params.dq, place, dtype, kernel);
      dsink_logits[i] += row.dsink;
    }
    if (!params.is_biased()) continue;
    const int64_t place = batch * params.num_heads + head;
    bias_gradients.clear(place);
    bias_gradients.set(place, 0, seqlen_kv, dbias.data(), row.dslope);
  }
  dk.write(params.dk, kv_head * seqlen_kv, dtype, kernel);
  dv.write(params.dv, kv_head * seqlen_kv, dtype, kernel);
}

}  // namespace sparse_attn::cpu
