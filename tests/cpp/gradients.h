// Gradients of a problem, and the same from the definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/backward/backward.h"
#include "problem.h"

namespace sparse_attn::testing {

// Gradients of a problem whose forward pass has run, and the same from the definition.
struct Gradients {
  // A contiguous result, what it should be, and the sum of the absolute values added up for that.
  struct Result {
    std::string name;
    DType dtype;
    std::vector<char> bytes;
    std::vector<double> expected, magnitude;

    Result(const char* n, DType type, int64_t size)
        : name(n),
          dtype(type),
          bytes(size * sparse_attn::element_size(type), static_cast<char>(0xff)),
          expected(size),
          magnitude(size) {}

    void add(int64_t i, double value, double size) {
      expected[i] += value;
      magnitude[i] += size;
    }

    void check(const std::string& problem, double tolerance) const {
      for (size_t i = 0; i < expected.size(); ++i) {
        float value;
        const char* p = bytes.data() + i * sparse_attn::element_size(dtype);
        if (dtype == DType::kFloat32) {
          std::memcpy(&value, p, 4);
        } else {
          uint16_t bits;
          std::memcpy(&bits, p, 2);
          value = static_cast<float>(from_half(bits, dtype));
        }
        if (std::abs(value - expected[i]) <= tolerance * (1 + magnitude[i])) continue;
        std::printf("%s: %s[%d] = %g, expected %g\n", problem.c_str(), name.c_str(), int(i), value,
                    expected[i]);
        std::exit(1);
      }
    }
  };

  Problem& problem;
  const ForwardParams& params;
  Tensor dout;
  std::vector<float> dlse;
  Result dq, dk, dv, dsinks, dbias, dslopes;

  explicit Gradients(Problem& p)
      : problem(p),
        params(p.params),
        dout(params.dtype, params.batch, params.num_heads, params.seqlen_q, params.head_dim_v),
        dlse(params.batch * params.num_heads * params.seqlen_q),
        dq("dq", params.dtype, params.batch * params.num_heads * params.seqlen_q * params.head_dim),
        dk("dk", params.dtype,
           params.batch * params.num_kv_heads * params.seqlen_kv * params.head_dim),
        dv("dv", params.dtype,
           params.batch * params.num_kv_heads * params.seqlen_kv * params.head_dim_v),
        dsinks("dsinks", DType::kFloat32, p.sinks.size()),
        dbias("dbias", DType::kFloat32, p.bias.size() / 3),
        dslopes("dslopes", DType::kFloat32, p.slopes.size()) {
    dout.fill_normal();
    std::normal_distribution<float> normal;
    for (float& x : dlse) x = normal(generator);
  }

  void run(Isa isa, const Parallel& threads) {
    problem.describe();
    BackwardParams backward;
    static_cast<AttentionParams&>(backward) = params;
    backward.out = params.out;
    backward.out_stride = params.out_stride;
    backward.lse = params.lse;
    backward.dout = dout.bytes.data();
    backward.dout_stride = dout.strides;
    backward.dlse = dlse.data();
    backward.dq = dq.bytes.data();
    backward.dk = dk.bytes.data();
    backward.dv = dv.bytes.data();
    if (!problem.sinks.empty()) {
      backward.dsink_logits = reinterpret_cast<float*>(dsinks.bytes.data());
    }
    if (!problem.bias.empty()) backward.dkey_bias = reinterpret_cast<float*>(dbias.bytes.data());
    if (!problem.slopes.empty()) {
      backward.dalibi_slopes = reinterpret_cast<float*>(dslopes.bytes.data());
    }
    sparse_attn::cpu::backward(backward, isa, threads);
  }

  // The result depends neither on the number of threads nor on who runs first.
  void check_threads(Isa isa, const std::string& name) {
    const auto results = [&] {
      return std::vector{dq.bytes, dk.bytes, dv.bytes, dsinks.bytes, dbias.bytes, dslopes.bytes};
    };
    const auto expected = results();
    for (int64_t num_threads : {1, 3}) {
      run(isa, Problem::one_after_the_other(num_threads));
      if (results() == expected) continue;
      std::printf("gradients of %s differ when %d threads run one after the other\n", name.c_str(),
                  static_cast<int>(num_threads));
      std::exit(1);
    }
  }

  void expect_row(int64_t b, int64_t h, int64_t i) {
    const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
    const int64_t row = (b * params.num_heads + h) * params.seqlen_q + i;
    const double lse = problem.lse[row];
    double delta = -dlse[row];
    for (int64_t d = 0; d < params.head_dim_v; ++d) {
      delta += dout.at(b, h, i, d) * problem.out.at(b, h, i, d);
    }
    if (!problem.sinks.empty()) {
      const double weight = std::exp(problem.sinks[h] - lse);
      dsinks.add(h, -weight * delta, weight * (1 + std::abs(delta)));
    }
    for (int64_t j = 0; j < params.seqlen_kv; ++j) {
      if (!problem.sees(b, h, i, j)) continue;
      const double s = problem.score(b, h, i, j), p = std::exp(s - lse);
      const int64_t key = (b * params.num_kv_heads + kv_head) * params.seqlen_kv + j;
      double dp = 0;
      for (int64_t d = 0; d < params.head_dim_v; ++d) {
        const double x = dout.at(b, h, i, d);
        dp += x * problem.v.at(b, kv_head, j, d);
        dv.add(key * params.head_dim_v + d, p * x, p * std::abs(x));
      }
      const double ratio = problem.unbiased_score(b, h, i, j) / params.softcap;
      const double slope = params.softcap > 0 ? 1 - ratio * ratio : 1.0;
      const double dscore = p * (dp - delta), ds = params.scale * dscore * slope;
      const double dsize = p * (1 + std::abs(dp) + std::abs(delta));
      const double size = std::abs(params.scale) * dsize;
      if (!problem.bias.empty()) dbias.add(problem.bias_index(b, h, j), dscore, dsize);
      if (!problem.slopes.empty()) {
        const double distance = static_cast<double>(problem.distance(i, j));
        dslopes.add(h, -dscore * distance, dsize * distance);
      }
      for (int64_t d = 0; d < params.head_dim; ++d) {
        const double x = problem.q.at(b, h, i, d), y = problem.k.at(b, kv_head, j, d);
        dq.add(row * params.head_dim + d, ds * y, size * std::abs(y));
        dk.add(key * params.head_dim + d, ds * x, size * std::abs(x));
      }
    }
  }

  void check(const std::string& name) {
    for (int64_t b = 0; b < params.batch; ++b)
      for (int64_t h = 0; h < params.num_heads; ++h)
        for (int64_t i = 0; i < params.seqlen_q; ++i) expect_row(b, h, i);
    const double tolerance = params.dtype == DType::kFloat32 ? 3e-6 : 1e-2;
    for (const Result* result : {&dq, &dk, &dv, &dsinks, &dbias, &dslopes}) {
      result->check(name, tolerance);
    }
  }
};

}  // namespace sparse_attn::testing
