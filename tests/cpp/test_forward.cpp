// Compares the CPU kernels with a double loop over rows and keys, on random layouts, data types,
// strides and instruction sets, and checks that broken layouts are refused. Every buffer has the
// exact size that its strides need, so that AddressSanitizer sees any access outside a tensor.
//
//   make -C tests/cpp sanitize
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/backward/backward.h"
#include "cpu/forward/forward.h"
#include "cpu/search/hip.h"
#include "cpu/search/infinite_hip.h"
#include "cpu/search/top_blocks.h"

namespace {

using sparse_attn::AttentionParams;
using sparse_attn::BackwardParams;
using sparse_attn::DType;
using sparse_attn::ForwardParams;
using sparse_attn::IndexLists;
using sparse_attn::Strides;
using sparse_attn::cpu::Isa;
using sparse_attn::cpu::Parallel;

std::mt19937 generator(20240229);

int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <class T>
T choose(std::initializer_list<T> values) {
  return values.begin()[random_int(0, static_cast<int64_t>(values.size()) - 1)];
}

// float16 and bfloat16 as bits; only normal numbers and zero occur here.
uint16_t to_half(float x, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  if (exponent >= 31)
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | (x != x ? 0x7e00 : 0x7c00));
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

double from_half(uint16_t x, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  const double magnitude = (x >> 10 & 31) == 0 ? std::ldexp(x & 1023, -24)
                                               : std::ldexp(1024 + (x & 1023), (x >> 10 & 31) - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}

// As torch's: kernels treat whole cache lines in their own ways.
template <class T>
struct LineAllocator {
  using value_type = T;

  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const = default;
};

// A [batch, heads, rows, dim] tensor in a heap block of exactly the size it needs.
struct Tensor {
  DType dtype;
  int64_t sizes[4];
  Strides strides;
  std::vector<char, LineAllocator<char>> bytes;

  Tensor(DType type, int64_t batch, int64_t heads, int64_t rows, int64_t dim)
      : dtype(type), sizes{batch, heads, rows, dim} {
    const int64_t slack = choose<int64_t>({0, 0, 3});
    if (random_int(0, 1) == 0) {
      strides.row = dim + slack;
      strides.head = strides.row * rows;
      strides.batch = strides.head * heads;
    } else {  // [batch, rows, heads, dim] in memory
      strides.head = dim + slack;
      strides.row = strides.head * heads;
      strides.batch = strides.row * rows;
    }
    const bool empty = batch * heads * rows * dim == 0;
    const int64_t elements = empty ? 0
                                   : (batch - 1) * strides.batch + (heads - 1) * strides.head +
                                         (rows - 1) * strides.row + dim;
    // Ones in every bit are NaN in every type.
    bytes.assign(elements * sparse_attn::element_size(dtype), static_cast<char>(0xff));
  }

  int64_t offset(int64_t b, int64_t h, int64_t r, int64_t d) const {
    return b * strides.batch + h * strides.head + r * strides.row + d;
  }

  double at(int64_t b, int64_t h, int64_t r, int64_t d) const {
    const char* p = bytes.data() + offset(b, h, r, d) * sparse_attn::element_size(dtype);
    if (dtype == DType::kFloat32) {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, p, 2);
    return from_half(x, dtype);
  }

  void set(int64_t b, int64_t h, int64_t r, int64_t d, float x) {
    const uint16_t half = to_half(x, dtype);
    char* p = bytes.data() + offset(b, h, r, d) * sparse_attn::element_size(dtype);
    if (dtype == DType::kFloat32) {
      std::memcpy(p, &x, 4);
    } else {
      std::memcpy(p, &half, 2);
    }
  }

  void fill_normal() {
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t r = 0; r < sizes[2]; ++r)
          for (int64_t d = 0; d < sizes[3]; ++d) set(b, h, r, d, normal(generator));
  }

  // Puts a number that is not finite, or a huge or tiny one, into a row.
  void poison() {
    if (sizes[2] == 0) return;
    set(random_int(0, sizes[0] - 1), random_int(0, sizes[1] - 1), random_int(0, sizes[2] - 1),
        random_int(0, sizes[3] - 1),
        choose({NAN, INFINITY, -INFINITY, 6e4f, 3e18f, -3e38f, 1e-40f}));
  }
};

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
  std::vector<float> lse, sinks;
  std::vector<int32_t> sink, window;
  Lists blocks, columns;

  Problem(DType dtype, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seqlen_q,
          int64_t seqlen_kv, int64_t dim, int64_t dim_v)
      : q(dtype, batch, heads, seqlen_q, dim),
        k(dtype, batch, kv_heads, seqlen_kv, dim),
        v(dtype, batch, kv_heads, seqlen_kv, dim_v),
        out(dtype, batch, heads, seqlen_q, dim_v),
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
    const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
    double s = 0;
    for (int64_t d = 0; d < params.head_dim; ++d) s += q.at(b, h, i, d) * k.at(b, kv_head, j, d);
    s *= params.scale;
    return params.softcap > 0 ? params.softcap * std::tanh(s / params.softcap) : s;
  }

  // Compares one row of the result with the definition.
  void check_row(int64_t b, int64_t h, int64_t i, const std::string& name) const {
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
      std::printf("%s: lse[%d, %d, %d] = %g, expected %g\n", name.c_str(), int(b), int(h), int(i),
                  actual_lse, expected_lse);
      std::exit(1);
    }
    const double allowed = params.dtype == DType::kFloat32 ? 2e-5 : 3e-2;
    for (int64_t d = 0; d < params.head_dim_v; ++d) {
      const double value = sum > 0 ? expected[d] / sum : 0.0;
      if (!(std::abs(out.at(b, h, i, d) - value) <= allowed)) {
        std::printf("%s: out[%d, %d, %d, %d] = %g, expected %g\n", name.c_str(), int(b), int(h),
                    int(i), int(d), out.at(b, h, i, d), value);
        std::exit(1);
      }
    }
  }

  void check(const std::string& name) const {
    for (int64_t b = 0; b < params.batch; ++b)
      for (int64_t h = 0; h < params.num_heads; ++h)
        for (int64_t i = 0; i < params.seqlen_q; ++i) check_row(b, h, i, name);
  }
};

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
  Result dq, dk, dv, dsinks;

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
        dsinks("dsinks", DType::kFloat32, p.sinks.size()) {
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
    sparse_attn::cpu::backward(backward, isa, threads);
  }

  // The result depends neither on the number of threads nor on who runs first.
  void check_threads(Isa isa, const std::string& name) {
    const auto results = [&] { return std::vector{dq.bytes, dk.bytes, dv.bytes, dsinks.bytes}; };
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
      const double slope = params.softcap > 0 ? 1 - s / params.softcap * (s / params.softcap) : 1.0;
      const double ds = params.scale * p * (dp - delta) * slope;
      const double size = std::abs(params.scale) * p * (1 + std::abs(dp) + std::abs(delta));
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
    for (const Result* result : {&dq, &dk, &dv, &dsinks}) result->check(name, tolerance);
  }
};

Problem random_problem(bool decode) {
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

// HiP's search for the blocks of one query block, a node being the list of its blocks.
std::vector<int32_t> search_blocks(const sparse_attn::cpu::HipParams& params, const Tensor& q,
                                   const Tensor& k, int64_t b, int64_t h, int64_t row) {
  const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
  const int64_t begin = row * params.block_q, stop = begin + params.block_q;
  const int64_t last_row = std::min(stop, params.seqlen_q) - 1;
  const int64_t off = params.seqlen_kv - params.seqlen_q;
  const int64_t last_end =
      params.is_causal ? std::min(stop + off, params.seqlen_kv) : params.seqlen_kv;
  const int64_t end = last_end - (params.is_causal ? params.window : 0);
  std::vector<int32_t> blocks;
  for (int64_t n = params.sink / params.block_k; n * params.block_k < end; ++n) {
    blocks.push_back(static_cast<int32_t>(n));
  }
  const auto num_blocks = std::ssize(blocks);
  if (num_blocks <= params.slots) return blocks;
  const auto product = [&](int64_t i, int64_t j) {
    double s = 0;
    for (int64_t d = 0; d < params.head_dim; ++d) s += q.at(b, h, i, d) * k.at(b, kv_head, j, d);
    return s;
  };
  std::vector<double> origins(last_row + 1, end < last_end ? -INFINITY : 0.0);
  for (int64_t i = begin; i <= last_row && end < last_end; ++i) {
    for (int64_t j = 0; j < last_end; ++j) {
      if (j < params.sink || j >= end) origins[i] = std::max(origins[i], product(i, j));
    }
  }
  const auto score = [&](int32_t block) {
    double best = -INFINITY;
    for (int64_t i = begin; i <= last_row; ++i) {
      const bool sampled =
          params.strict ? i == begin : (i - begin + 1) % params.stride_q == 0 || i == last_row;
      if (!sampled) continue;
      for (int64_t o = params.stride_k / 2; o < params.block_k; o += params.stride_k) {
        const int64_t j = std::min(block * params.block_k + o, end - 1);
        best = std::max(best, product(i, j) - origins[i]);
      }
    }
    return best;
  };
  int64_t size = 1;
  while ((num_blocks + size - 1) / size > 8 * params.slots) size *= 2;
  using Node = std::vector<int32_t>;
  std::vector<Node> nodes;
  const auto add = [&](int64_t first, int64_t stop) {
    if (first < stop) nodes.emplace_back(blocks.begin() + first, blocks.begin() + stop);
  };
  for (int64_t n = 0; n < num_blocks; n += size) add(n, std::min(n + size, num_blocks));
  while (true) {
    std::vector<std::pair<double, Node>> judged;
    for (const Node& node : nodes) {
      double best = score(node[std::min<size_t>(size / 2, node.size() - 1)]);
      if (params.representatives > 1) best = std::max(best, score(node[0]));
      judged.emplace_back(-best, node);
    }
    std::stable_sort(judged.begin(), judged.end());
    judged.resize(params.slots);
    std::sort(judged.begin(), judged.end(),
              [](const auto& x, const auto& y) { return x.second < y.second; });
    nodes.clear();
    for (const auto& [_, node] : judged) {
      const int64_t first = node[0] - blocks[0], end = first + std::ssize(node);
      add(first, std::min(first + std::max<int64_t>(size / 2, 1), end));
      add(first + std::max<int64_t>(size / 2, 1), end);
    }
    if (size == 1) break;
    size /= 2;
  }
  for (size_t i = 0; i < nodes.size(); ++i) blocks[i] = nodes[i][0];
  blocks.resize(nodes.size());
  return blocks;
}

void check_hip(Isa isa) {
  sparse_attn::cpu::HipParams params;
  params.dtype = choose({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  params.batch = random_int(1, 2);
  params.num_kv_heads = random_int(1, 2);
  params.num_heads = params.num_kv_heads * random_int(1, 3);
  params.seqlen_q = choose<int64_t>({1, 40, 130});
  params.seqlen_kv = choose<int64_t>({0, 1, 100, 333});
  params.head_dim = choose<int64_t>({1, 40, 64, 256});
  params.block_q = choose<int64_t>({1, 32, 64});
  params.block_k = choose<int64_t>({1, 3, 16, 32});
  params.stride_q = random_int(1, params.block_q);
  params.stride_k = choose<int64_t>({1, params.block_k});
  params.representatives = random_int(1, 2);
  params.slots = random_int(1, 40);
  params.sink = random_int(0, 20);
  params.window = random_int(0, 60);
  params.strict = random_int(0, 3) == 0;
  params.is_causal = random_int(0, 3) > 0;
  Tensor q(params.dtype, params.batch, params.num_heads, params.seqlen_q, params.head_dim);
  Tensor k(params.dtype, params.batch, params.num_kv_heads, params.seqlen_kv, params.head_dim);
  q.fill_normal();
  k.fill_normal();
  params.q = q.bytes.data();
  params.k = k.bytes.data();
  params.q_stride = q.strides;
  params.k_stride = k.strides;
  const int64_t num_blocks = (params.seqlen_kv + params.block_k - 1) / params.block_k;
  params.width = std::min(params.slots, num_blocks);
  const int64_t lists = params.batch * params.num_heads * params.num_rows();
  std::vector<int32_t> counts(lists, -1), indices(lists * params.width, -1);
  params.counts = counts.data();
  params.indices = indices.data();
  sparse_attn::cpu::hip_select(params, isa, Problem::two_threads());
  for (int64_t i = 0; i < lists; ++i) {
    const int64_t head = i / params.num_rows();
    const std::vector<int32_t> expected = search_blocks(
        params, q, k, head / params.num_heads, head % params.num_heads, i % params.num_rows());
    const auto begin = indices.begin() + i * params.width;
    if (counts[i] != static_cast<int32_t>(expected.size()) ||
        !std::equal(expected.begin(), expected.end(), begin)) {
      std::printf("%s: HiP chose other blocks\n", isa_name(isa));
      std::exit(1);
    }
  }
}

// What a stage of InfiniteHiP keeps of some chunks, for one query block.
std::vector<int32_t> keep_chunks(const sparse_attn::cpu::InfiniteHipParams& params, const Tensor& q,
                                 const Tensor& k, int64_t b, int64_t group, int64_t row,
                                 const std::vector<int64_t>& candidates) {
  const int64_t begin = row * params.block_q;
  const int64_t stop = std::min(begin + params.block_q, params.seqlen_q);
  const int64_t end = params.seqlen_kv - params.behind;
  const int64_t limit =
      params.is_causal
          ? std::max<int64_t>(0, begin + params.seqlen_kv - params.seqlen_q - params.behind)
          : end;
  std::vector<std::pair<double, int32_t>> scored;
  for (const int64_t chunk : candidates) {
    double best = -INFINITY;
    bool searched = false;
    for (int64_t h = group; h < (params.shared ? params.num_heads : group + 1); ++h) {
      const int64_t kv_head = h / (params.num_heads / params.num_kv_heads);
      const auto product = [&](int64_t j) {
        double most = -INFINITY;
        for (int64_t i = begin; i < stop; i += params.stride_q) {
          const int64_t rows = std::min(params.stride_q, stop - i);
          double s = 0;
          for (int64_t d = 0; d < params.head_dim; ++d) {
            double sum = 0;
            for (int64_t r = i; r < i + rows; ++r) sum += q.at(b, h, r, d);
            s += sum / rows * k.at(b, kv_head, j, d);
          }
          most = std::max(most, s);
        }
        return most;
      };
      int64_t left = params.sink + chunk * params.chunk;
      int64_t right = std::min(left + params.chunk, end);
      for (double size = params.chunk; size >= 1; size /= 2) {
        if (left >= right || left > limit) break;
        searched = true;
        const int64_t centre = (left + right) / 2;
        const double lower = product((left + centre) / 2), upper = product((centre + right) / 2);
        best = std::max({best, lower, upper});
        (lower > upper ? right : left) = centre;
      }
    }
    if (searched) scored.emplace_back(-best, static_cast<int32_t>(chunk));
  }
  std::stable_sort(scored.begin(), scored.end(),
                   [](const auto& x, const auto& y) { return x.first < y.first; });
  scored.resize(std::min<size_t>(scored.size(), params.width));
  std::vector<int32_t> kept;
  for (const auto& [score, chunk] : scored) kept.push_back(chunk);
  std::sort(kept.begin(), kept.end());
  return kept;
}

void check_infinite_hip(Isa isa) {
  sparse_attn::cpu::InfiniteHipParams params;
  params.dtype = choose({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  params.batch = random_int(1, 2);
  params.num_kv_heads = random_int(1, 2);
  params.num_heads = params.num_kv_heads * random_int(1, 3);
  params.seqlen_q = choose<int64_t>({1, 40, 130});
  params.seqlen_kv = choose<int64_t>({1, 100, 333});
  params.head_dim = choose<int64_t>({1, 40, 64, 256});
  params.block_q = choose<int64_t>({1, 32, 64});
  params.stride_q = choose<int64_t>({1, 2, 4});
  params.chunk = choose<int64_t>({1, 3, 8, 64});
  params.parent = params.chunk * random_int(1, 4);
  params.slots = random_int(1, 20);
  params.sink = random_int(0, 20);
  params.window = random_int(0, 60);
  params.behind = random_int(0, 40);
  params.shared = random_int(0, 1) == 0;
  params.is_causal = random_int(0, 3) > 0;
  Tensor q(params.dtype, params.batch, params.num_heads, params.seqlen_q, params.head_dim);
  Tensor k(params.dtype, params.batch, params.num_kv_heads, params.seqlen_kv, params.head_dim);
  q.fill_normal();
  k.fill_normal();
  if (params.dtype != DType::kFloat32) params.stride_q = 1;  // means are rounded
  params.q = q.bytes.data();
  params.k = k.bytes.data();
  params.q_stride = q.strides;
  params.k_stride = k.strides;
  params.width = std::min(params.slots, (params.seqlen_kv + params.chunk - 1) / params.chunk);
  const int64_t rows = params.num_rows(), lists = params.batch * params.groups() * rows;
  const bool listed = random_int(0, 2) > 0;
  params.listed_width = 6;
  std::vector<int32_t> listed_counts(lists), listed_indices(lists * params.listed_width);
  const int64_t num_parents = (params.seqlen_kv + params.parent - 1) / params.parent;
  for (int32_t& n : listed_counts) n = static_cast<int32_t>(random_int(-1, 9));
  for (int32_t& i : listed_indices) i = static_cast<int32_t>(random_int(-2, num_parents + 1));
  if (listed) {
    params.listed_counts = listed_counts.data();
    params.listed_indices = listed_indices.data();
  }
  std::vector<int32_t> counts(lists, -1), indices(lists * params.width, -1);
  params.counts = counts.data();
  params.indices = indices.data();
  sparse_attn::cpu::infinite_hip_stage(params, isa, Problem::two_threads());
  for (int64_t i = 0; i < lists; ++i) {
    std::vector<int64_t> candidates;
    if (listed) {
      const int64_t parts = params.parent / params.chunk;
      for (int32_t j = 0; j < std::min<int32_t>(listed_counts[i], 6); ++j) {
        const int64_t parent = listed_indices[i * params.listed_width + j];
        if (parent < 0 || parent >= num_parents) continue;
        for (int64_t part = 0; part < parts; ++part) candidates.push_back(parent * parts + part);
      }
    } else {
      const int64_t last = params.seqlen_kv - params.window;
      for (int64_t j = 0; params.sink + j * params.chunk < last; ++j) candidates.push_back(j);
    }
    const int64_t group = i / rows;
    const std::vector<int32_t> expected = keep_chunks(
        params, q, k, group / params.groups(), group % params.groups(), i % rows, candidates);
    if (counts[i] != static_cast<int32_t>(expected.size()) ||
        !std::equal(expected.begin(), expected.end(), indices.begin() + i * params.width)) {
      std::printf("%s: InfiniteHiP chose other chunks\n", isa_name(isa));
      std::exit(1);
    }
  }
}

void expect_refusal(const char* message, const std::function<void(Problem&)>& damage, Isa isa) {
  Problem problem(DType::kFloat32, 1, 2, 1, 70, 90, 8, 8);
  problem.params.block_q = problem.params.block_kv = 16;
  problem.sink = {0, 0};
  problem.window = {0};
  problem.blocks.make(1, 2, 5, 6, 1.0);
  problem.columns.make(1, 1, 5, 90, 1.0);
  damage(problem);
  try {
    problem.run(isa);
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(message) != std::string::npos) return;
    std::printf("expected '%s' but got '%s'\n", message, error.what());
    std::exit(1);
  }
  std::printf("not refused: %s\n", message);
  std::exit(1);
}

void check_refusals(Isa isa) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  const auto block = [](int64_t i, int32_t value) {
    return [=](Problem& p) { p.blocks.indices[i] = value; };
  };
  expect_refusal("kv_indices[0, 0, 0, 5] = 6 is out of range: the layout has 6 key blocks",
                 block(5, 6), isa);
  expect_refusal("kv_indices[0, 0, 0, 0] = -1", block(0, -1), isa);
  expect_refusal("kv_indices[0, 1, 4, 5]", block(59, kMost), isa);
  expect_refusal("kv_indices[0, 0, 0, 3] = 2 follows 2", block(3, 2), isa);
  expect_refusal("kv_num_blocks[0, 1, 0] = 7", [](Problem& p) { p.blocks.counts[5] = 7; }, isa);
  expect_refusal("kv_num_blocks[0, 0, 0] = -1", [](Problem& p) { p.blocks.counts[0] = -1; }, isa);
  expect_refusal(
      "column_indices[0, 0, 0, 89] = 90", [](Problem& p) { p.columns.indices[89] = 90; }, isa);
  expect_refusal("num_columns[0, 0, 4]", [](Problem& p) { p.columns.counts[4] = kMost; }, isa);
  expect_refusal("sink[1] = -1", [](Problem& p) { p.sink[1] = -1; }, isa);
  expect_refusal("window[0] = -2", [](Problem& p) { p.window[0] = -2; }, isa);
}

void check_top_blocks() {
  const int64_t rows = random_int(0, 300), blocks = random_int(0, 200);
  const int64_t top_k = std::min(blocks, random_int(1, 100));
  std::vector<float> scores(rows * blocks);
  for (float& score : scores) {
    score = choose({-INFINITY, -1.5f, -0.0f, 0.0f, 1e-40f, 2.0f, INFINITY,
                    static_cast<float>(random_int(-50, 50))});
  }
  std::vector<int32_t> counts(rows), indices(rows * top_k);
  sparse_attn::cpu::top_blocks({scores.data(), rows, blocks, top_k, counts.data(), indices.data()},
                               Problem::two_threads());
  for (int64_t row = 0; row < rows; ++row) {
    const float* score = scores.data() + row * blocks;
    std::vector<int32_t> expected;
    for (int32_t i = 0; i < blocks; ++i) {
      if (score[i] > -INFINITY) expected.push_back(i);
    }
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t a, int32_t b) { return score[a] > score[b]; });
    expected.resize(std::min<size_t>(expected.size(), top_k));
    std::sort(expected.begin(), expected.end());
    const bool is_right =
        counts[row] == static_cast<int32_t>(expected.size()) &&
        std::equal(expected.begin(), expected.end(), indices.begin() + row * top_k);
    if (is_right) continue;
    std::printf("top_blocks differs in row %d of %d\n", static_cast<int>(row),
                static_cast<int>(rows));
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int num_problems = argc > 1 ? std::atoi(argv[1]) : 150;
  for (int level = 0; level < sparse_attn::cpu::kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!is_supported(isa)) continue;
    generator.seed(20240229);
    check_refusals(isa);
    for (int i = 0; i < num_problems; ++i) {
      Problem problem = random_problem(i % 4 == 0);
      problem.run(isa);
      const std::string name = std::string(isa_name(isa)) + ", problem " + std::to_string(i);
      problem.check(name);
      if (i % 4 == 1) problem.check_threads(isa, name);
      if (i % 4 == 2) check_top_blocks();
      if (i % 4 == 0) check_hip(isa);
      if (i % 4 == 1) check_infinite_hip(isa);
      if (i % 4 == 2) {
        for (Tensor* x : {&problem.q, &problem.k, &problem.v}) x->poison();
        problem.run(isa);
        problem.check_threads(isa, name + " with numbers that are not finite");
        Gradients poisoned(problem);
        poisoned.run(isa, Problem::two_threads());
        poisoned.check_threads(isa, name + " with numbers that are not finite");
      }
      if (i % 2 == 0) continue;
      Gradients gradients(problem);
      gradients.run(isa, Problem::two_threads());
      gradients.check(name);
      if (i % 4 == 1) gradients.check_threads(isa, name);
    }
    std::printf("%s: %d random problems agree, broken layouts are refused\n", isa_name(isa),
                num_problems);
  }
  return 0;
}
