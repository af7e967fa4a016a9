// How products of q and k become scores: scale, softcap, biases, and -inf for what a row does not
// see.
#pragma once

#include "cuda/walk.h"

namespace sparse_attn::cuda {

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

DEVICE float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + exp2_approx(x * (2.0f * kLog2E))); }

// What the scores of one head need.
struct Scores {
  float scale, softcap, slope;
  bool is_plain;
  Global<const float> bias;
  int64_t bias_stride;

  DEVICE float of(float product, int p, int j) const {
    float score = product * scale;
    if (softcap > 0.0f) score = softcap * tanh_of(score / softcap);
    if (!bias.is_null()) score += load(bias + j * bias_stride);
    if (slope != 0.0f) score -= slope * static_cast<float>(distance(p, j));
    return score;
  }
};

DEVICE Scores scores_of(const ScoreArguments& arguments, int batch, int head) {
  Scores scores{arguments.scale, arguments.softcap, 0.0f, arguments.is_plain, {}, 0};
  if (!arguments.key_bias.is_null()) {
    scores.bias = arguments.key_bias + (batch * arguments.bias_stride.batch +
                                        head / arguments.bias_group * arguments.bias_stride.head);
    scores.bias_stride = arguments.bias_stride.row;
  }
  if (!arguments.alibi_slopes.is_null()) {
    scores.slope = load(arguments.alibi_slopes + head * arguments.slope_stride);
  }
  return scores;
}

// The lane's part of 16 rows of products. `p` is the position of its first row, the other one lies
// 8 further.
template <int kTiles>
DEVICE void score_tile(float (&s)[kTiles][4], const Scores& scores, const Walk& walk, int tile,
                       uint32_t positions, int p, int lane) {
  const bool is_open = walk.is_open(tile);
  if (is_open && scores.is_plain) return;
  const bool in_band = walk.is_of_band(tile);
  UNROLL
  for (int n = 0; n < kTiles; ++n) {
    const Int2 keys = load_shared<Int2>(positions + (n * 8 + lane % 4 * 2) * 4);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int j = i % 2 == 0 ? keys.x : keys.y;
      const int row = p + i / 2 * 8;
      if (!is_open && !walk.sees(row, j, in_band)) {
        s[n][i] = -kInfinity;
      } else if (!scores.is_plain) {
        s[n][i] = scores.of(s[n][i], row, j);
      }
    }
  }
}

}  // namespace sparse_attn::cuda
