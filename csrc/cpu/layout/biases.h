// What a head adds to the scores of keys after the softcap: a bias for each key, and ALiBi's
// distances.
#pragma once

#include "params.h"

namespace sparse_attn::cpu {

// Of some keys: row r of a tile adds bias[i] - slope * |r - offset[i]| to the score of key i.
template <int kKeys>
struct KeyTerms {
  alignas(64) float bias[kKeys];
  alignas(64) float offset[kKeys];  // from the position of the tile's first row to the key's
  float slope;
};

// The biases of one head, seen from a row at the position `origin`.
class HeadBias {
 public:
  HeadBias(const AttentionParams& params, int64_t batch, int64_t head, int64_t origin)
      : origin_(origin) {
    const KeyBias& bias = params.key_bias;
    if (bias.data != nullptr) {
      const int64_t own_head = head / (params.num_heads / bias.heads);
      bias_ = bias.data + batch * bias.stride.batch + own_head * bias.stride.head;
      stride_ = bias.stride.row;
    }
    if (params.alibi_slopes != nullptr) slope_ = params.alibi_slopes[head * params.alibi_stride];
  }

  float bias(int64_t key) const { return bias_ != nullptr ? bias_[key * stride_] : 0.0f; }
  // Exact up to 2^24, whatever the positions are.
  float offset(int64_t key) const { return static_cast<float>(key - origin_); }
  float distance(int64_t key) const { return offset(key) < 0 ? -offset(key) : offset(key); }
  float term(int64_t key) const { return bias(key) - slope_ * distance(key); }

  // The terms of `count` keys, of which key_at(i) is the i-th; zeros follow.
  template <int kKeys, class KeyAt>
  void describe(int count, KeyAt key_at, KeyTerms<kKeys>& terms) const {
    for (int i = 0; i < kKeys; ++i) {
      terms.bias[i] = i < count ? bias(key_at(i)) : 0.0f;
      terms.offset[i] = i < count ? offset(key_at(i)) : 0.0f;
    }
    terms.slope = slope_;
  }

 private:
  const float* bias_ = nullptr;
  int64_t stride_ = 0;
  float slope_ = 0.0f;
  int64_t origin_;
};

}  // namespace sparse_attn::cpu
