// What the kernel for the gradients of one row offers.
#pragma once

#include <cstdint>

#include "cpu/layout/biases.h"
#include "params.h"

namespace sparse_attn::cpu {

// One row; vectors of dims are padded with zeros to `dim` and `dim_v`, multiples of 16.
struct RowGradients : ScoreParams {
  int64_t dim = 0, dim_v = 0;
  const float *q = nullptr, *dout = nullptr;
  const float *k = nullptr, *v = nullptr;  // rows of all keys
  const int32_t* keys = nullptr;           // those that the row sees
  int64_t num_keys = 0;
  float dlse = 0.0f;
  const float* sink_logit = nullptr;
  const HeadBias* bias = nullptr;  // of the row, if anything is added to scores
  float* scratch = nullptr;        // [row_gradient_floats(num_keys)]

  float* dq = nullptr;                 // is set
  float *dk = nullptr, *dv = nullptr;  // rows of all keys, are added to
  double dsink = 0;                    // is set
  double* dbias = nullptr;             // of all keys, is added to
  double dslope = 0;                   // is added to
};

inline int64_t padded_row(int64_t dim) { return (dim + 15) / 16 * 16; }
inline int64_t row_gradient_floats(int64_t num_keys) { return 3 * padded_row(num_keys); }

struct RowGradientKernel {
  void (*to_floats)(const void* row, int64_t dim, float* dest) = nullptr;
  void (*from_floats)(const float* row, int64_t dim, void* dest) = nullptr;
  void (*run)(RowGradients& row) = nullptr;
};

}  // namespace sparse_attn::cpu
