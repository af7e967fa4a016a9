// The online softmax of 16 rows. A lane holds parts of two of them, of each the sum and the largest
// score.
#pragma once

#include "cuda/scores.h"

namespace sparse_attn::cuda {

struct SoftmaxState {
  float top[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};  // of the lane's columns
};

// Scores become weights, 2^(factor * (score - top)); what was summed before is scaled. The maximum
// is subtracted first, so that scores of any size keep their differences.
template <int kTiles, int kDimTiles>
DEVICE void exponentiate(float (&s)[kTiles][4], float (&out)[kDimTiles][4], SoftmaxState& state,
                         float factor) {
  UNROLL
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half];
    UNROLL
    for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float origin = top == -kInfinity ? 0.0f : top;
    const float kept = exp2_approx((state.top[half] - origin) * factor);
    state.top[half] = top;
    state.sum[half] *= kept;
    UNROLL
    for (int n = 0; n < kDimTiles; ++n) {
      out[n][half * 2] *= kept;
      out[n][half * 2 + 1] *= kept;
    }
    UNROLL
    for (int n = 0; n < kTiles; ++n) {
      UNROLL
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        s[n][i] = exp2_approx((s[n][i] - origin) * factor);
        state.sum[half] += s[n][i];
      }
    }
  }
}

struct RowResult {
  float weight, lse;  // out is the sum times `weight`
};

// A row without keys has a weight of 0 and an lse of the sink logit, or -inf.
DEVICE RowResult finish_row(const SoftmaxState& state, int half, float factor, float sink_logit) {
  float sum = state.sum[half];
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  const float of_keys = state.top[half] * factor, of_sink = sink_logit * kLog2E;
  const float top = fmaxf(of_keys, of_sink);
  if (top == -kInfinity) return {0.0f, -kInfinity};
  const float share = exp2_approx(of_keys - top);
  const float total = sum * share + exp2_approx(of_sink - top);
  return {share * reciprocal_approx(total), (top + log2_approx(total)) * kLn2};
}

}  // namespace sparse_attn::cuda
