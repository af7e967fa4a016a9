// The running softmax of one row and its end.
#pragma once

#include "cpu/simd/vector_math.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kMinusInfinity = -kInfinity;
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Scores are `scale` times q.k: the sign goes into q, so that `scale` is positive.
struct ScoreScale {
  float q_factor, scale;
};

static inline ScoreScale split_scale(float scale) {
  if (scale == 0.0f) return {0.0f, 1.0f};
  return {scale < 0 ? -1.0f : 1.0f, scale < 0 ? -scale : scale};
}

// Bit i of `bits` becomes lane i: its score, or -inf.
SPARSE_ATTN_INLINE Vec keep_visible(Vec scores, uint32_t bits) {
  IntVec lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  const IntVec selected = (IntVec{} + static_cast<int32_t>(bits)) & lane_bit;
  return selected != 0 ? scores : broadcast(kMinusInfinity);
}

struct RowEnd {
  float factor;  // what the row's accumulator is multiplied with
  float lse;
};

// Ends a row of weights exp(s_j - m) that sum up to l, with an optional logit in the sum. The
// greatest logit may be no number or infinite: then so are lse, their logarithm, and the weights.
// A row without keys has l = 0, m = -inf, and result 0.
static inline RowEnd finish_row(double m, float l, const float* sink_logit) {
  const double sink = sink_logit != nullptr ? *sink_logit : kMinusInfinity;
  const double top = m > sink || m != m ? m : sink;
  if (!(top > kMinusInfinity && top < kInfinity)) {
    return {l == 0 ? 0.0f : kNaN, static_cast<float>(top)};
  }
  if (sink == kMinusInfinity) return {1.0f / l, static_cast<float>(m + std::log(l))};
  const double weight = std::exp(m - top), sum = l * weight + std::exp(sink - top);
  return {static_cast<float>(weight / sum), static_cast<float>(top + std::log(sum))};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
