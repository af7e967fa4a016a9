#include "cpu/backward/bias_gradients.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "cpu/layout/visibility.h"

namespace sparse_attn::cpu {

BiasGradients::BiasGradients(const BackwardParams& params, int64_t key_tiles)
    : params_(params), key_tiles_(key_tiles) {
  const int64_t heads = params.batch * params.num_heads;
  if (params.dkey_bias != nullptr) by_key_.resize(heads * params.seqlen_kv);
  if (params.dalibi_slopes != nullptr) by_tile_.resize(heads * key_tiles);
}

void BiasGradients::set(int64_t head, int64_t first_key, int64_t keys, const double* dbias,
                        double dslope) {
  if (!by_key_.empty()) {
    std::copy(dbias, dbias + keys, by_key_.begin() + head * params_.seqlen_kv + first_key);
  }
  if (!by_tile_.empty()) by_tile_[head * key_tiles_ + first_key / kKeyTile] = dslope;
}

void BiasGradients::clear(int64_t head) {
  const auto fill = [&](auto& values, int64_t n) {
    if (!values.empty()) std::fill_n(values.begin() + head * n, n, 0);
  };
  fill(by_key_, params_.seqlen_kv);
  fill(by_tile_, key_tiles_);
}

void BiasGradients::write(const Parallel& parallel) const {
  const auto [batch, num_heads, keys] =
      std::tuple(params_.batch, params_.num_heads, params_.seqlen_kv);
  if (params_.dkey_bias != nullptr) {
    const int64_t bias_heads = params_.key_bias.heads, group = num_heads / bias_heads;
    const int64_t sharing = params_.key_bias.is_shared ? batch : 1;
    parallel.run(batch / sharing * bias_heads, [&](int64_t i) {
      std::vector<double> sum(keys);
      for (int64_t b = 0; b < sharing; ++b) {
        const int64_t first = (i / bias_heads + b) * num_heads + i % bias_heads * group;
        for (int64_t h = first; h < first + group; ++h) {
          for (int64_t j = 0; j < keys; ++j) sum[j] += by_key_[h * keys + j];
        }
      }
      std::copy(sum.begin(), sum.end(), params_.dkey_bias + i * keys);
    });
  }
  for (int64_t h = 0; params_.dalibi_slopes != nullptr && h < num_heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const auto begin = by_tile_.begin() + (b * num_heads + h) * key_tiles_;
      sum = std::accumulate(begin, begin + key_tiles_, sum);
    }
    params_.dalibi_slopes[h] = static_cast<float>(sum);
  }
}

}  // namespace sparse_attn::cpu
