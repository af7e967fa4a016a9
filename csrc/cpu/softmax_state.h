// The running softmax of one row, in base 2, and its end.
#pragma once

#include "vector_math.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

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

// Ends a row of maximum m and sum l = sum_j 2^(s_j - m), with an optional logit in the sum.
static inline RowEnd finish_row(float m, float l, const float* sink_logit) {
  if (sink_logit == nullptr) {
    if (m == kMinusInfinity) return {0.0f, kMinusInfinity};
    return {1.0f / l, static_cast<float>((m + static_cast<double>(std::log2(l))) * kLn2)};
  }
  const double sink = *sink_logit * kLog2e;
  const double top = std::max<double>(m, sink);
  if (top == kMinusInfinity) return {0.0f, kMinusInfinity};
  const double scale = std::exp2(m - top);
  const double sum = l * scale + std::exp2(sink - top);
  return {static_cast<float>(scale / sum), static_cast<float>((top + std::log2(sum)) * kLn2)};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
