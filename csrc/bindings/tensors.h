// Tensors as the plain structs of params.h: checks, descriptions, allocation. Only torch's stable
// ABI is used.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <limits>
#include <optional>
#include <ostream>

#include "params.h"
#include "require.h"

namespace sparse_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() / 2;

// For messages: text << shape_of(tensor).
struct ShapeOf {
  const Tensor& tensor;
};
inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }
std::ostream& operator<<(std::ostream& text, const ShapeOf& shape);

// Refusals.
void require_shape(const Tensor& tensor, const char* name, int64_t dim);
void require_int32(const Tensor& tensor, const char* name, int64_t dim);
void require_dtype_of_q(const Tensor& tensor, const char* name, const Tensor& q);
void require_unit_stride(const Tensor& tensor, const char* name);
void require_heads(int64_t heads, const char* name, const QkParams& params);
// Once the heads and head dims of the params are set.
void require_heads_and_dims(const AttentionParams& params);

// Descriptions.
DType dtype_of(const Tensor& q);
Strides strides_of(const Tensor& tensor, const char* name);
void describe_qk(const Tensor& q, const Tensor& k, QkParams& params);
void describe_qkv(const Tensor& q, const Tensor& k, const Tensor& v, AttentionParams& params);
PerHead describe_per_head(const Tensor& tensor, const char* name, const QkParams& params);
IndexLists describe_lists(const std::optional<Tensor>& counts, const char* counts_name,
                          const std::optional<Tensor>& indices, const char* indices_name,
                          int64_t rows, const QkParams& params);
inline const int32_t* int32_data(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}
inline const float* float_data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
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
void* writable(Tensor& tensor, DType dtype);

}  // namespace sparse_attn
