#include "cpu/search/top_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "integers.h"

namespace sparse_attn::cpu {

namespace {

// An integer that compares as the score does; NaN, which is never chosen, as -inf.
int32_t rank_of(float score) {
  if (std::isnan(score)) score = -INFINITY;
  const int32_t bits = std::bit_cast<int32_t>(score + 0.0f);  // -0 becomes 0
  return bits < 0 ? bits ^ std::numeric_limits<int32_t>::max() : bits;
}

// The number of ranks above `bound`, one vector of them after the other.
int64_t count_above(const std::vector<int32_t>& ranks, int32_t bound) {
  int32_t count = 0;
  for (const int32_t rank : ranks) count += rank > bound;
  return count;
}

// Ranks above `bound` are chosen, and the first `ties` that are equal to it.
struct Threshold {
  int32_t bound = 0;
  int64_t ties = 0;
};

Threshold find_threshold(const std::vector<int32_t>& ranks, int64_t top_k) {
  const int32_t never = rank_of(-INFINITY);
  if (count_above(ranks, never) <= top_k) return {never, 0};
  // More than top_k are above `low`, and `above_high` of them, no more than top_k, above `high`.
  int64_t low = never, high = std::numeric_limits<int32_t>::max(), above_high = 0;
  while (high - low > 1 && above_high != top_k) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t above = count_above(ranks, static_cast<int32_t>(middle));
    if (above > top_k) {
      low = middle;
    } else {
      high = middle;
      above_high = above;
    }
  }
  return {static_cast<int32_t>(high), top_k - above_high};
}

void choose(const TopBlocksParams& params, int64_t row, std::vector<int32_t>& ranks,
            std::vector<int32_t>& chosen) {
  const float* scores = params.scores + row * params.blocks;
  ranks.resize(params.blocks);
  chosen.resize(params.blocks + 1);
  std::transform(scores, scores + params.blocks, ranks.begin(), rank_of);
  auto [bound, ties] = find_threshold(ranks, params.top_k);
  int32_t count = 0;
  for (int64_t i = 0; i < params.blocks; ++i) {
    const bool is_tie = ranks[i] == bound && ties > 0;
    ties -= is_tie;
    chosen[count] = static_cast<int32_t>(i);
    count += is_tie || ranks[i] > bound;
  }
  int32_t* indices = params.indices + row * params.top_k;
  int32_t* end = std::copy_n(chosen.begin(), count, indices);
  std::fill(end, indices + params.top_k, static_cast<int32_t>(params.blocks));
  params.counts[row] = count;
}

}  // namespace

void top_blocks(const TopBlocksParams& params, const Parallel& threads) {
  constexpr int64_t kScoresPerTask = 1 << 15;
  const int64_t rows_per_task = std::max<int64_t>(1, kScoresPerTask / (params.blocks + 1));
  const auto run = [&](int64_t task) {
    thread_local std::vector<int32_t> ranks, chosen;
    const int64_t end = std::min(params.rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) choose(params, row, ranks, chosen);
  };
  const int64_t num_tasks = ceil_div(params.rows, rows_per_task);
  if (num_tasks > 1) {
    threads.run(num_tasks, run);
  } else if (num_tasks == 1) {
    run(0);
  }
}

}  // namespace sparse_attn::cpu
