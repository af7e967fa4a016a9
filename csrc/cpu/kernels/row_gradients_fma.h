// The gradients of one row in float32, for any vector width: eager attention's formulas.
#pragma once

#include "cpu/kernels/by_dtype.h"
#include "cpu/kernels/row_gradients_kernel.h"
#include "cpu/simd/softmax_state.h"
#include "cpu/simd/words.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

static float dot_rows(const float* a, const float* b, int64_t dim) {
  Vec sum = {};
  for (int64_t d = 0; d < dim; d += kLanes) sum += load(a + d) * load(b + d);
  return reduce_add(sum);
}

// dest += factor * source
static void add_row(float factor, const float* source, int64_t dim, float* dest) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    store(dest + d, load(dest + d) + broadcast(factor) * load(source + d));
  }
}

// Turns scores of n keys, followed by -inf, into exp(s - top) and returns their sum.
static double exponentials(float* scores, int64_t n, float top) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp2_nonpositive(load(scores + i) - top, static_cast<float>(kLog2e));
    store(scores + i, e);
    total += reduce_add(e);
  }
  return total;
}

static void row_gradients(RowGradients& row) {
  const int64_t n = row.num_keys, padded = padded_row(n), dim = row.dim, dim_v = row.dim_v;
  float *p = row.scratch, *dp = p + padded, *slope = dp + padded;
  for (int64_t i = 0; i < n; ++i) {
    p[i] = dot_rows(row.q, row.k + row.keys[i] * dim, dim) * row.scale;
    dp[i] = dot_rows(row.dout, row.v + row.keys[i] * dim_v, dim_v);
  }
  std::fill(slope, slope + padded, 1.0f);
  for (int64_t i = 0; row.softcap > 0 && i < n; i += kLanes) {
    const Vec s = load(p + i), t = tanh(s / row.softcap);
    store(slope + i, 1.0f - t * t);
    store(p + i, cap_softly(s, row.softcap));
  }
  for (int64_t i = 0; row.bias != nullptr && i < n; ++i) p[i] += row.bias->term(row.keys[i]);
  std::fill(p + n, p + padded, kMinusInfinity);
  float top = row.sink_logit != nullptr ? *row.sink_logit : kMinusInfinity;
  for (int64_t i = 0; i < n; ++i) top = maximum_or_nan(p[i], top);
  double total = exponentials(p, n, top), sink = 0;
  if (row.sink_logit != nullptr) sink = std::exp(double{*row.sink_logit} - double{top});
  total += sink;
  double delta = -double{row.dlse};
  for (int64_t i = 0; i < n; ++i) {
    p[i] = static_cast<float>(p[i] / total);
    delta += double{p[i]} * double{dp[i]};
  }
  const bool is_empty = n == 0 && top == kMinusInfinity;
  row.dsink = row.sink_logit == nullptr || is_empty ? 0.0 : -(sink / total) * delta;
  std::fill(row.dq, row.dq + dim, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const float dscore = static_cast<float>(p[i] * (dp[i] - delta));
    if (row.bias != nullptr) {
      row.dbias[row.keys[i]] += dscore;
      row.dslope -= double{dscore} * double{row.bias->distance(row.keys[i])};
    }
    const float ds = dscore * slope[i] * row.scale;
    add_row(ds, row.k + row.keys[i] * dim, dim, row.dq);
    add_row(ds, row.q, dim, row.dk + row.keys[i] * dim);
    add_row(p[i], row.dout, dim_v, row.dv + row.keys[i] * dim_v);
  }
}

template <class T>
static void row_to_floats(const void* row, int64_t dim, float* dest) {
  convert_row(static_cast<const T*>(row), dim, dest);
}

template <class T>
static void row_from_floats(const float* row, int64_t dim, void* dest) {
  round_row(row, 1.0f, dim, static_cast<T*>(dest));
}

template <class T>
static constexpr RowGradientKernel kFmaRowGradient = {
    .to_floats = row_to_floats<T>,
    .from_floats = row_from_floats<T>,
    .run = row_gradients,
};

static constexpr ByDType<RowGradientKernel> kFmaRowGradients = {
    .float32 = &kFmaRowGradient<float>,
    .bfloat16 = &kFmaRowGradient<BFloat16>,
    .float16 = &kFmaRowGradient<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
