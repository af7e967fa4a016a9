// How products of q and k become scores: scale, softcap, biases, and -inf for what a row does not
// see.
#pragma once

#include "cuda/walk.h"

namespace sparse_attn::cuda {

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

DEVICE float tanh_of(float x) {
  return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(x * (2.0f * kLog2E)));
}

// What the scores of one head need.
struct Scores {
  float scale, softcap, slope;
  bool is_plain;
  Global<const float> bias;
  int64_t bias_stride;
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

// What happens to the score x of the row at position p and key j.
struct Scale {
  float scale;
  DEVICE float operator()(float x, int, int) const { return x * scale; }
};
struct Softcap {
  float softcap, scale;  // scale / softcap
  DEVICE float operator()(float x, int, int) const { return softcap * tanh_of(x * scale); }
};
struct KeyBias {
  Global<const float> bias;
  int64_t stride;
  DEVICE float operator()(float x, int, int j) const {
    return j == kNoKey ? x : x + load(bias + j * stride);
  }
};
struct Slope {
  float slope;
  DEVICE float operator()(float x, int p, int j) const {
    return x - slope * static_cast<float>(distance(p, j));
  }
};
struct Hide {
  const Walk& walk;
  bool in_band;
  DEVICE float operator()(float x, int p, int j) const {
    return walk.sees(p, j, in_band) ? x : -kInfinity;
  }
};

// The lane's part of 16 rows of products, and the positions of its rows and keys.
template <int kTiles>
struct ScoreTile {
  float (&s)[kTiles][4];
  uint32_t positions;  // of the lane's first keys, in shared memory
  int p;               // of its first row; the other one lies 8 further

  // Options differ by call and not by lane, so each has a loop of its own.
  template <class Change>
  DEVICE void change(const Change& of) const {
    UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const Int2 keys = load_shared<Int2>(positions + n * 32);
      UNROLL
      for (int i = 0; i < 4; ++i) {
        s[n][i] = of(s[n][i], p + i / 2 * 8, i % 2 == 0 ? keys.x : keys.y);
      }
    }
  }
};

template <int kTiles>
DEVICE void add_options(const ScoreTile<kTiles>& tile, const Scores& scores) {
  if (scores.softcap > 0.0f) {
    tile.change(Softcap{scores.softcap, scores.scale / scores.softcap});
  } else {
    tile.change(Scale{scores.scale});
  }
  if (!scores.bias.is_null()) tile.change(KeyBias{scores.bias, scores.bias_stride});
  if (scores.slope != 0.0f) tile.change(Slope{scores.slope});
}

template <int kTiles>
DEVICE void score_tile(float (&s)[kTiles][4], const Scores& scores, const Walk& walk, int tile,
                       uint32_t positions, int p, int lane) {
  const ScoreTile<kTiles> part{s, positions + lane % 4 * 8, p};
  if (!scores.is_plain) add_options(part, scores);
  if (!walk.is_open(tile, positions)) part.change(Hide{walk, walk.is_of_band(tile)});
}

}  // namespace sparse_attn::cuda
