#include "hip.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>
#include <numeric>
#include <vector>

#include "aligned_buffer.h"

namespace sparse_attn::cpu {

const HipKernel& hip_kernel(Isa isa, DType dtype, int64_t num_rows) {
#if defined(__x86_64__)
  constexpr int64_t kFewRows = 4;  // tiles multiply 16 in the same time
  if (isa == Isa::kAmx && dtype == DType::kBFloat16 && num_rows > kFewRows) {
    return amx_hip_kernel();
  }
  if (isa >= Isa::kAvx512) return avx512_hip_kernel(dtype);
  if (isa == Isa::kAvx2) return avx2_hip_kernel(dtype);
#endif
  return generic_hip_kernel(dtype);
}

namespace {

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// A run of key blocks, counted from the first one that is searched, and how two of them rank.
struct Node {
  int32_t first;
  uint32_t first_rank, centre_rank;
};

// Floats in the order of their values; NaN comes first.
uint32_t rank_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // no negative zero
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The search of one query block after the other, in memory that is kept.
class TreeSearch {
 public:
  explicit TreeSearch(const HipParams& params, const HipKernel& kernel)
      : params_(params), kernel_(kernel) {}

  void run(int64_t b, int64_t head, int64_t row) {
    const int64_t first_row = row * params_.block_q;
    end_ = params_.seqlen_kv;
    if (params_.is_causal) {
      const int64_t off = params_.seqlen_kv - params_.seqlen_q;
      end_ = std::min(first_row + params_.block_q + off, end_) - params_.window;
    }
    first_block_ = params_.sink / params_.block_k;
    const int64_t num_blocks =
        std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, end_), params_.block_k) - first_block_);
    const int64_t count = std::min(params_.slots, num_blocks);
    const int64_t list = (b * params_.num_heads + head) * params_.num_rows() + row;
    params_.counts[list] = static_cast<int32_t>(count);
    int32_t* indices = params_.indices + list * params_.width;
    std::fill(indices + count, indices + params_.width, 0);
    if (count < num_blocks) {
      search(b, head, first_row, num_blocks);
      for (int64_t j = 0; j < count; ++j) {
        indices[j] = static_cast<int32_t>(first_block_ + nodes_[j].first);
      }
    } else {
      std::iota(indices, indices + count, static_cast<int32_t>(first_block_));
    }
  }

 private:
  void search(int64_t b, int64_t head, int64_t first_row, int64_t num_blocks) {
    prepare_queries(b, head, first_row);
    const int64_t kv_head = head / (params_.num_heads / params_.num_kv_heads);
    keys_ = byte_offset(params_.k, b * params_.k_stride.batch + kv_head * params_.k_stride.head);
    const bool firsts = params_.representatives > 1;
    const int32_t end = static_cast<int32_t>(num_blocks);
    int32_t size = 1;  // of a node
    while (ceil_div(end, size) > 2 * params_.slots) size *= 2;
    nodes_.clear();
    for (int32_t first = 0; first < end; first += size) nodes_.push_back({first, 0, 0});
    if (firsts) {
      rank_blocks([](const Node& node) { return node.first; }, &Node::first_rank);
    }
    while (true) {
      if (size > 1 || !firsts) {
        rank_blocks([&](const Node& node) { return std::min(node.first + size / 2, end - 1); },
                    &Node::centre_rank);
      }
      keep_best();
      if (size == 1) break;
      size /= 2;
      split(size, end);
    }
  }

  const std::byte* byte_offset(const void* base, int64_t elements) const {
    return static_cast<const std::byte*>(base) + elements * element_size(params_.dtype);
  }

  void prepare_queries(int64_t b, int64_t head, int64_t first_row) {
    const int64_t end = std::min(first_row + params_.block_q, params_.seqlen_q);
    pointers_.clear();
    const auto sample = [&](int64_t row) {
      pointers_.push_back(byte_offset(
          params_.q,
          b * params_.q_stride.batch + head * params_.q_stride.head + row * params_.q_stride.row));
    };
    if (params_.strict) {
      sample(first_row);
    } else {
      int64_t row = first_row + params_.stride_q - 1;
      for (; row < end - 1; row += params_.stride_q) sample(row);
      sample(end - 1);
    }
    num_rows_ = static_cast<int64_t>(pointers_.size());
    queries_.reserve(kernel_.query_bytes(num_rows_, params_.head_dim));
    kernel_.prepare_queries(pointers_.data(), num_rows_, params_.head_dim, queries_.data());
  }

  // A node of 2 size blocks has its second half from its centre on.
  void split(int32_t size, int32_t end) {
    halves_.clear();
    for (const Node node : nodes_) {
      halves_.push_back({node.first, node.first_rank, 0});
      if (node.first + size < end) halves_.push_back({node.first + size, node.centre_rank, 0});
    }
    nodes_.swap(halves_);
  }

  // Ranks one block of each node: its largest product of a sampled row and a sampled key.
  void rank_blocks(auto block_of, uint32_t Node::* rank) {
    const int64_t row_bytes = params_.k_stride.row * element_size(params_.dtype);
    pointers_.clear();
    for (const Node& node : nodes_) {
      const int64_t begin = (first_block_ + block_of(node)) * params_.block_k;
      for (int64_t i = params_.stride_k / 2; i < params_.block_k; i += params_.stride_k) {
        pointers_.push_back(keys_ + std::min(begin + i, end_ - 1) * row_bytes);
      }
    }
    const int64_t count = static_cast<int64_t>(pointers_.size());
    const int64_t per_node = count / static_cast<int64_t>(nodes_.size());
    pointers_.resize(ceil_div(count, kHipKeys) * kHipKeys, pointers_.back());
    scores_.resize(pointers_.size());
    kernel_.score(queries_.data(), num_rows_, params_.head_dim, pointers_.data(), count,
                  scores_.data());
    const float* score = scores_.data();
    for (Node& node : nodes_) {
      node.*rank = rank_of(*std::max_element(score, score + per_node));
      score += per_node;
    }
  }

  // Leaves the nodes of highest rank; of equal ones the first.
  void keep_best() {
    ranks_.clear();
    for (const Node& node : nodes_) ranks_.push_back(rank(node));
    const auto last = ranks_.begin() + params_.slots - 1;
    std::nth_element(ranks_.begin(), last, ranks_.end(), std::greater<>());
    const uint32_t lowest = *last;
    int64_t ties = std::count(ranks_.begin(), last + 1, lowest);
    std::erase_if(nodes_, [&](const Node& node) {
      return rank(node) < lowest || (rank(node) == lowest && ties-- <= 0);
    });
  }

  uint32_t rank(const Node& node) const {
    return params_.representatives > 1 ? std::max(node.first_rank, node.centre_rank)
                                       : node.centre_rank;
  }

  const HipParams& params_;
  const HipKernel& kernel_;
  int64_t end_ = 0, first_block_ = 0;  // the searched keys
  int64_t num_rows_ = 0;               // sampled ones
  const std::byte* keys_ = nullptr;
  AlignedBuffer queries_;
  std::vector<Node> nodes_, halves_;
  std::vector<const void*> pointers_;
  std::vector<float> scores_;
  std::vector<uint32_t> ranks_;
};

}  // namespace

void hip_select(const HipParams& params, Isa isa, const Parallel& parallel) {
  const int64_t rows = params.num_rows();
  const int64_t num_tasks = params.batch * params.num_heads * rows;
  if (num_tasks == 0) return;
  const int64_t block_rows = std::min(params.block_q, params.seqlen_q);
  const int64_t sampled = params.strict ? 1 : ceil_div(block_rows, params.stride_q);
  const HipKernel& kernel = hip_kernel(isa, params.dtype, sampled);
  const int64_t group = params.num_heads / params.num_kv_heads;
  std::atomic<int64_t> next_task{0};
  const auto work = [&](int64_t) {
    TreeSearch search(params, kernel);
    const uint32_t saved = kernel.enter();
    for (int64_t i = next_task++; i < num_tasks; i = next_task++) {
      // The heads that share a KV head follow each other, as they read many of the same keys.
      const int64_t kv_head = i / group / rows, row = i / group % rows;
      const int64_t b = kv_head / params.num_kv_heads;
      search.run(b, kv_head % params.num_kv_heads * group + i % group, row);
    }
    kernel.leave(saved);
  };
  parallel.run(std::min(num_tasks, parallel.num_threads), work);
}

}  // namespace sparse_attn::cpu
