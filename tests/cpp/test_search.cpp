// Compares the searches of selectors with the same read literally, on random queries, keys and
// instruction sets.
//
//   make -C tests/cpp sanitize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "cpu/search/hip.h"
#include "cpu/search/infinite_hip.h"
#include "cpu/search/top_blocks.h"
#include "problem.h"

namespace sparse_attn::testing {

namespace {

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

void check_top_blocks() {
  const int64_t rows = random_int(0, 300), blocks = random_int(0, 200);
  const int64_t top_k = std::min(blocks, random_int(1, 100));
  std::vector<float> scores(rows * blocks);
  for (float& score : scores) {
    score = choose({-INFINITY, NAN, -1.5f, -0.0f, 0.0f, 1e-40f, 2.0f, INFINITY,
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

}  // namespace sparse_attn::testing

int main(int argc, char** argv) {
  using namespace sparse_attn::testing;
  const int num_problems = argc > 1 ? std::atoi(argv[1]) : 40;
  for (int level = 0; level < sparse_attn::cpu::kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!is_supported(isa)) continue;
    generator.seed(20240229);
    for (int i = 0; i < num_problems; ++i) {
      check_hip(isa);
      check_infinite_hip(isa);
      check_top_blocks();
    }
    std::printf("%s: %d random searches agree\n", isa_name(isa), num_problems);
  }
  return 0;
}
