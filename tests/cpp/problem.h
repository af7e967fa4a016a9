// A random call of the forward pass, and what it gives by a double loop over rows and keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu/forward/forward.h"
#include "tensors.h"

namespace sparse_attn::testing {

using cpu::Isa;
using cpu::Parallel;

struct Lists {
  std::vector<int32_t> counts, indices;
  IndexLists view;

  void make(int64_t batch, int64_t heads, int64_t rows, int64_t num_values, double density) {
    view.batch = batch;
    view.heads = heads;
    view.rows = rows;
    std::vector<std::vector<int32_t>> all;
    for (int64_t i = 0; i < batch * heads * rows; ++i) {
      std::vector<int32_t> row;
      for (int64_t value = 0; value < num_values; ++value) {
        if (random_int(0, 999) < 1000 * density) row.push_back(static_cast<int32_t>(value));
      }
      view.width = std::max<int64_t>(view.width, row.size());
      all.push_back(row);
    }
    for (auto& row : all) {
      counts.push_back(static_cast<int32_t>(row.size()));
      row.resize(view.width, -7);
      indices.insert(indices.end(), row.begin(), row.end());
    }
    view.counts = counts.data();
    view.indices = indices.data();
  }

  bool contains(int64_t b, int64_t h, int64_t num_heads, int64_t row, int64_t value) const {
    const int64_t batch = view.batch == 1 ? 0 : b;
    const int64_t i = (batch * view.heads + h / (num_heads / view.heads)) * view.rows + row;
    const auto begin = indices.begin() + i * view.width;
    return std::find(begin, begin + counts[i], value) != begin + counts[i];
  }
};

struct Problem {
  ForwardParams params;
  Tensor q, k, v, out;
  std::vector<float> lse, sinks, slopes;
  std::vector<float> bias;  // [batch or 1, heads, keys, 3], of which the second of three is used
  int64_t bias_batch = 1, bias_heads = 1;
  std::vector<int32_t> sink, window;
  Lists blocks, columns;

  Problem(DType dtype, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seqlen_q,
          int64_t seqlen_kv, int64_t dim, int64_t dim_v, int64_t alignment = 1)
      : q(dtype, batch, heads, seqlen_q, dim, alignment),
        k(dtype, batch, kv_heads, seqlen_kv, dim, alignment),
        v(dtype, batch, kv_heads, seqlen_kv, dim_v, alignment),
        out(dtype, batch, heads, seqlen_q, dim_v, alignment),
        lse(batch * heads * seqlen_q) {
    q.fill_normal();
    k.fill_normal();
    v.fill_normal();
    params.dtype = dtype;
    params.batch = batch;
    params.num_heads = heads;
    params.num_kv_heads = kv_heads;
    params.seqlen_q = seqlen_q;
    params.seqlen_kv = seqlen_kv;
    params.head_dim = dim;
    params.head_dim_v = dim_v;
  }

  void run(Isa isa) {
    describe();
    sparse_attn::cpu::forward(params, isa, two_threads());
  }

  // The result depends neither on the number of threads nor on who runs first.
  void check_threads(Isa isa, const std::string& name) {
    const auto expected = out.bytes;
    const std::vector<float> expected_lse = lse;
    for (int64_t num_threads : {1, 3}) {
      std::fill(out.bytes.begin(), out.bytes.end(), static_cast<char>(0xff));
      sparse_attn::cpu::forward(params, isa, one_after_the_other(num_threads));
      const bool same_lse =
          std::equal(lse.begin(), lse.end(), expected_lse.begin(), [](float a, float b) {
            return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
          });
      if (out.bytes == expected && same_lse) continue;
      std::printf("%s differs when %d threads run one after the other\n", name.c_str(),
                  static_cast<int>(num_threads));
      std::exit(1);
    }
  }

  void describe() {
    params.q = q.bytes.data();
    params.k = k.bytes.data();
    params.v = v.bytes.data();
    params.out = out.bytes.data();
    params.lse = lse.data();
    params.lse_stride = params.seqlen_q;
    params.q_stride = q.strides;
    params.k_stride = k.strides;
    params.v_stride = v.strides;
    params.out_stride = out.strides;
    params.sink = {sink.data(), static_cast<int64_t>(sink.size())};
    params.window = {window.data(), static_cast<int64_t>(window.size())};
    params.blocks = blocks.view;
    params.columns = columns.view;
    params.sink_logits = sinks.empty() ? nullptr : sinks.data();
    params.alibi_slopes = slopes.empty() ? nullptr : slopes.data();
    if (bias.empty()) return;
    const int64_t head = 3 * params.seqlen_kv;
    params.key_bias.data = bias.data() + 1;
    params.key_bias.heads = bias_heads;
    params.key_bias.is_shared = bias_batch == 1;
    params.key_bias.stride = {bias_batch == 1 ? 0 : bias_heads * head, head, 3};
  }

  // Which number of [bias_batch, bias_heads, keys] is added to the score.
  int64_t bias_index(int64_t b, int64_t h, int64_t j) const {
    const int64_t head = h / (params.num_heads / bias_heads);
    return ((bias_batch == 1 ? 0 : b) * bias_heads + head) * params.seqlen_kv + j;
  }
  int64_t distance(int64_t i, int64_t j) const {
    return std::abs(i + params.seqlen_kv - params.seqlen_q - j);
  }

  static Parallel two_threads() {
    Parallel parallel;
    parallel.num_threads = 2;
    parallel.run = [](int64_t n, const std::function<void(int64_t)>& f) {
      std::thread other([&] {
        for (int64_t i = 1; i < n; i += 2) f(i);
      });
      for (int64_t i = 0; i < n; i += 2) f(i);
      other.join();
    };
    return parallel;
  }

  // As in a parallel region within another one.
  static Parallel one_after_the_other(int64_t num_threads) {
    return {num_threads, [](int64_t n, const std::function<void(int64_t)>& f) {
              for (int64_t i = n; i-- > 0;) f(i);
            }};
  }

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t p = i + params.seqlen_kv - params.seqlen_q;
    if (params.is_causal && j > p) return false;
    const auto per_head = [&](const std::vector<int32_t>& x) {
      return x[h / (params.num_heads / static_cast<int64_t>(x.size()))];
    };
    if (j < per_head(sink)) return true;
    const int64_t w = per_head(window), distance = p - j;
    if (w < 0 || (params.is_causal ? distance < w : std::abs(distance) < w)) return true;
    const int64_t row = i / params.block_q;
    if (blocks.view.present() &&
        blocks.contains(b, h, params.num_heads, row, j / params.block_kv)) {
      return true;
    }
    return columns.view.present() &&
           columns.contains(b, h, params.num_heads, row / params.column_group, j);
  }

  double score(int64_t b, int64_t h, int64_t i, int64_t j) const {
    double s = unbiased_score(b, h, i, j);
    if (!bias.empty()) s += bias[3 * bias_index(b, h, j) + 1];
    if (!slopes.empty()) s -= double{slopes[h]} * static_cast<double>(distance(i, j));
    return s;
  }

  double unbiased_score(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
    double s = 0;
    for (int64_t d = 0; d < params.head_dim; ++d) s += q.at(b, h, i, d) * k.at(b, kv_head, j, d);
    s *= params.scale;
    return params.softcap > 0 ? params.softcap * std::tanh(s / params.softcap) : s;
  }

  // How one row of the result differs from the definition; nothing if it does not.
  std::string difference(int64_t b, int64_t h, int64_t i) const {
    const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
    double top = sinks.empty() ? -INFINITY : sinks[h];
    std::vector<std::pair<int64_t, double>> scores;
    for (int64_t j = 0; j < params.seqlen_kv; ++j) {
      if (!sees(b, h, i, j)) continue;
      scores.emplace_back(j, score(b, h, i, j));
      top = std::max(top, scores.back().second);
    }
    double sum = sinks.empty() ? 0.0 : std::exp(sinks[h] - top);
    std::vector<double> expected(params.head_dim_v);
    for (const auto& [j, s] : scores) {
      sum += std::exp(s - top);
      for (int64_t d = 0; d < params.head_dim_v; ++d) {
        expected[d] += std::exp(s - top) * v.at(b, kv_head, j, d);
      }
    }
    const double expected_lse = top == -INFINITY ? top : top + std::log(sum);
    const double actual_lse = lse[(b * params.num_heads + h) * params.seqlen_q + i];
    if (!(actual_lse == expected_lse || std::abs(actual_lse - expected_lse) < 1e-3)) {
      return text("lse[%d, %d, %d] = %g, expected %g", int(b), int(h), int(i), actual_lse,
                  expected_lse);
    }
    const double allowed = params.dtype == DType::kFloat32 ? 2e-5 : 3e-2;
    for (int64_t d = 0; d < params.head_dim_v; ++d) {
      const double value = sum > 0 ? expected[d] / sum : 0.0;
      if (!(std::abs(out.at(b, h, i, d) - value) <= allowed)) {
        return text("out[%d, %d, %d, %d] = %g, expected %g", int(b), int(h), int(i), int(d),
                    out.at(b, h, i, d), value);
      }
    }
    return {};
  }

  // The first difference of the whole result.
  std::string difference() const {
    std::string found;
    for (int64_t b = 0; b < params.batch && found.empty(); ++b)
      for (int64_t h = 0; h < params.num_heads && found.empty(); ++h)
        for (int64_t i = 0; i < params.seqlen_q && found.empty(); ++i) found = difference(b, h, i);
    return found;
  }

  void check(const std::string& name) const {
    const std::string found = difference();
    if (found.empty()) return;
    std::printf("%s: %s\n", name.c_str(), found.c_str());
    std::exit(1);
  }

  static std::string text(const char* format, auto... values) {
    char result[200];
    std::snprintf(result, sizeof(result), format, values...);
    return result;
  }
};

inline Problem random_problem(bool decode) {
  const int64_t kv_heads = random_int(1, 2), heads = kv_heads * random_int(1, 5);
  const int64_t batch = random_int(1, 2);
  Problem problem(choose({DType::kFloat32, DType::kBFloat16, DType::kFloat16}), batch, heads,
                  kv_heads,
                  decode ? random_int(1, 16) : choose<int64_t>({0, 1, 5, 64, 97, 130, 150}),
                  decode ? random_int(1, 5000) : choose<int64_t>({0, 1, 31, 64, 100, 170, 270}),
                  choose<int64_t>({1, 16, 40, 64}), choose<int64_t>({3, 32, 50}));
  ForwardParams& params = problem.params;
  params.is_causal = random_int(0, 1);
  params.streams_out = random_int(0, 1);
  params.scale = choose({0.25f, 0.1f, -0.2f});
  params.softcap = choose({0.0f, 0.0f, 3.0f});
  params.block_q = choose<int64_t>({1, 16, 48, 64, 128});
  params.block_kv = choose<int64_t>({1, 16, 48, 64, 128});
  params.column_group = random_int(1, 3);
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  problem.sink.assign(choose({int64_t{1}, heads}), choose({0, 0, 5, kMost}));
  problem.window.assign(choose({int64_t{1}, kv_heads}), choose({0, 0, 1, 20, -1, kMost}));
  if (random_int(0, 3) == 0) problem.sinks.assign(heads, 0.5f);
  if (random_int(0, 2) == 0) {
    problem.bias_batch = choose({int64_t{1}, batch});
    problem.bias_heads = choose({int64_t{1}, kv_heads, heads});
    problem.bias.resize(problem.bias_batch * problem.bias_heads * params.seqlen_kv * 3, NAN);
    for (size_t i = 1; i < problem.bias.size(); i += 3) problem.bias[i] = choose({-1.f, 0.5f, 2.f});
  }
  for (int64_t h = 0, any = random_int(0, 2) == 0; any && h < heads; ++h) {
    problem.slopes.push_back(choose({0.01f, 0.25f, -0.02f}));
  }
  const int64_t rows = (params.seqlen_q + params.block_q - 1) / params.block_q;
  const int64_t groups = (rows + params.column_group - 1) / params.column_group;
  const int64_t num_blocks = (params.seqlen_kv + params.block_kv - 1) / params.block_kv;
  if (random_int(0, 2) > 0) {
    problem.blocks.make(choose({int64_t{1}, batch}), choose({int64_t{1}, heads}), rows, num_blocks,
                        choose({0.1, 0.5, 1.0}));
  }
  if (random_int(0, 2) == 0) {
    problem.columns.make(choose({int64_t{1}, batch}), choose({int64_t{1}, kv_heads}), groups,
                         params.seqlen_kv, choose({0.05, 0.3}));
  }
  return problem;
}

}  // namespace sparse_attn::testing
